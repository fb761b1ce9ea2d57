"""The names that `import fastar` gives."""

from fastar.api.after_runs import Curve, Fusion, Graph, Perturbation, Plane, Uncertainty
from fastar.api.barriers import barrier
from fastar.api.curves import Barrier
from fastar.api.matching import ManyMatched, Matched, apply, match, match_many
from fastar.api.models import Run, Star, TrainedModel
from fastar.api.recipe import Recipe
from fastar.api.training import load_run, sweep, train_sources, train_star
from fastar.data.user_data import UserSplits as Data
from fastar.errors import FastarError
