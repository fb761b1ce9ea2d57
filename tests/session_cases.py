"""Sessions of runs whose data and symmetry are at hand, so that nothing is read or derived."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastar.experiments.session import Session
from fastar.experiments.task import Network, RunData
from fastar.symmetry import Symmetry


class GivenData(RunData):
    """Datasets under the names of attributes: train, test, files."""

    def __init__(self, session: Session, **given: Any):
        super().__init__(session.settings, session.device, session.progress)
        vars(self).update(given)


class GivenNetwork(Network):
    """A network whose groups are known."""

    def __init__(self, session: Session, symmetry: Symmetry):
        super().__init__(session.settings, session.device, session.data)
        vars(self)["symmetry"] = symmetry


def with_data(session: Session, **given: Any) -> Session:
    data = GivenData(session, **given)
    return replace(session, data=data, network=Network(session.settings, session.device, data))


def with_symmetry(session: Session, symmetry: Symmetry) -> Session:
    return replace(session, network=GivenNetwork(session, symmetry))
