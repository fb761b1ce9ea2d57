"""Training of regular and star models over flat parameters; Algorithm 1 is in `star`."""

from fastar.training.amp import resolve_precision
from fastar.training.epochs import Epoch, Good, NonFiniteLoss, check_batch, limited
from fastar.training.loop import fit
from fastar.training.profiling import Profile, StepsProfile
from fastar.training.schedule import learning_rate, resolution
from fastar.training.source_shares import SourceShares
from fastar.training.sources import PART_ROWS, SourcesStore
from fastar.training.star import Matcher, StarStep, draw, match_store
from fastar.training.steps import RegularStep, Step, suitable_threads
