"""Rules of recurrent layers: LSTM, GRU and plain ones, and their cells. See `fastar.symmetry.rules.table`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastar.symmetry import labels, rearrange
from fastar.symmetry.labels import Cell, Labels
from fastar.symmetry.rules.call import Call, Refused
from fastar.symmetry.rules.products import contract
from fastar.symmetry.rules.shapes import apart


def _step(
    call: Call, x: Labels, states: Sequence[Labels], weights: Sequence[Labels], projection: Labels | None = None
) -> list[Labels]:
    """Labels [B, units] of the states after a step: the hidden state, and the cell state if there is one.

    Each gate has a row for each unit in the weights and biases: they move alike, and so do the columns that read the
    state, and the states before.

    Args:
        x: [B, features].
        states: [B, units] before the step, the hidden state first.
        weights: of the input, of the state, and the biases of both, if any.
        projection: [projected units, units] of a hidden state that is a product.
    """
    of_input, of_state, *biases = weights
    hidden, *cells = states
    units = (cells or [hidden])[0].shape[-1]
    gates = of_state.shape[0] // units
    batch = x.shape[0]
    state = _state(call, batch, of_state.shape[1], [hidden])
    rows = [
        contract(call, [(x, "bi"), (of_input, "oi")], "bo"),
        contract(call, [(state, "bi"), (of_state, "oi")], "bo"),
    ]
    sums = call.broadcast([*rows, *biases], (batch, gates * units))
    parts = rearrange.reshape(call.known, sums, (batch, gates, units))
    call.hold(parts, [1])
    of_units = labels.reduce(call.known, parts, {1})
    inner = _state(call, batch, units, [of_units, *cells])
    shown = inner if projection is None else contract(call, [(inner, "bi"), (projection, "oi")], "bo")
    after = labels.combine(call.known, state.shape, [state, shown], call.why)
    return [after, inner] if cells else [after]


def _state(call: Call, batch: int, units: int, alike: Sequence[Labels]) -> Labels:
    """Labels [B, units] of a state, whose units move as those of others do."""
    state = Labels((batch, units), (Cell((1,), call.known.fresh((units,))),) if units > 1 else ())
    return labels.combine(call.known, state.shape, [state, *alike], call.why)


def cell(results: int) -> Callable[[Call], Labels | list[Labels]]:
    """lstm_cell (two results), gru_cell, rnn_tanh_cell, rnn_relu_cell (one)."""

    def rule(call: Call) -> Labels | list[Labels]:
        given = call["hx"]
        states = [call.labels(one) for one in (given if isinstance(given, list | tuple) else [given])]
        names = ("w_ih", "w_hh", "b_ih", "b_hh")
        weights = [call.labels(name) for name in names if call.arguments.get(name) is not None]
        after = _step(call, call.labels("input"), states, weights)
        return after if results > 1 else after[0]

    return rule


def layer() -> Callable[[Call], list[Labels]]:
    """lstm (output, hidden state, cell state), gru, rnn_tanh and rnn_relu (output, hidden state)."""

    def rule(call: Call) -> list[Labels]:
        x, given = call.labels("input"), call["hx"]
        first = [call.labels(one) for one in (given if isinstance(given, list | tuple) else [given])]
        directions = 2 if call["bidirectional"] else 1
        params = [call.labels(one) for one in call["params"]]
        biases = 4 if call["has_biases"] else 2
        each = len(params) // (directions * call["num_layers"])  # one more where the state is projected
        if call["train"] and call["dropout"]:
            raise Refused("dropout that stays active in evaluation mode")
        time = 1 if call["batch_first"] else 0
        call.hold(x, [time])
        batch = x.shape[1 - time]
        # [B, features]: time is the same for all.
        names = {1 - time: 0, 2: 1}
        x = apart(call, x, [1 - time, 2]).moved(names, (batch, x.shape[2]))
        after: list[list[Labels]] = []
        for _ in range(call["num_layers"]):
            outs = []
            for _direction in range(directions):
                weights = params[len(after) * each : (len(after) + 1) * each]
                states = [_at(call, one, len(after)) for one in first]
                after.append(_step(call, x, states, weights[:biases], *weights[biases:]))
                outs.append(after[-1][0])
            x = rearrange.concatenate(call.known, outs, 1, call.why) if directions > 1 else outs[0]
        whole = call.shape
        out = x.moved({0: 1 - time, 1: 2}, whole)
        last = [rearrange.stack(call.known, list(states), 0, call.why) for states in zip(*after, strict=True)]
        return [out, *last]

    return rule


def _at(call: Call, states: Labels, number: int) -> Labels:
    """[B, units] of the states [layers and directions, B, units]."""
    one = rearrange.take(call.known, states, 0, np.array([number]))
    return one.moved({1: 0, 2: 1}, states.shape[1:])
