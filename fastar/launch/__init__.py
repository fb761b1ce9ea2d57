"""Work of the `fastar` command spread over processes: on this machine, by Slurm, by Ray.

A run folder is a list of work (`experiments.work_list`), so a job is nothing but a call of the command.
"""
