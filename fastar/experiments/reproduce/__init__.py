"""The paper's tables and figures, by name: what is missing is run, and ours stands beside the paper's."""

from fastar.experiments.reproduce.whole_id import listed, reproduce
