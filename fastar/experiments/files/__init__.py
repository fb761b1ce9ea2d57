"""Commands on files, whoever wrote them: matching, barriers, verifying."""
