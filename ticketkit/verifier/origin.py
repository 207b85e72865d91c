"""What is trained: the dense network, tickets of one or several levels, and their controls, as masks and starting weights.

Controls keep all but one thing of a ticket (P1, Fig. 8; "shuffled" is the layer-wise one of Frankle et al. 2021, "Pruning Neural
Networks at Initialization: Why Are We Missing the Mark?"). Their masks are drawn anew for each seed.

    random       as many weights, chosen uniformly over all layers
    shuffled     as many weights in each layer, at other places
    complement   the weights that the ticket prunes
    perturb=P    the fraction P of the ones, and as many zeros, flipped
    reinit       the ticket's mask on the random initialisation θ_0 of the seed
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ticketkit import masks as algebra
from ticketkit import models
from ticketkit.errors import TicketError
from ticketkit.masks import Masks
from ticketkit.search.rundir import Arrays, RunDir, named
from ticketkit.ticket import Ticket, read_safetensors

CONTROLS = ("random", "shuffled", "complement", "perturb=P", "reinit")
STARTS = ("rewound", "trained")
ELSEWHERE = ("random", "shuffled", "complement")  # controls that keep what the ticket prunes, which is zero in trained weights


@dataclass(frozen=True)
class Variant:
    """One thing to train: `kind` is "dense", "ticket" or a control; `level` the round it comes from, None for the dense network
    and for a ticket file that names no round."""

    kind: str
    level: int | None = None

    def __str__(self) -> str:
        words = {"dense": "dense", "ticket": "ticket"}.get(self.kind, f"control {self.kind}")
        return words if self.level is None else f"{words} of level {self.level}"


class Origin:
    """A ticket file or the run directory of `find`, and the levels of it that are asked for; RUN@K is level K."""

    def __init__(
        self, path: str | os.PathLike[str], levels: Sequence[int] | str | None, start: str, dense_weights: str | os.PathLike[str] | None
    ) -> None:
        if start not in STARTS:
            raise TicketError(f"--start: expected one of {', '.join(STARTS)}, got {start!r}")
        (self.path, at), self.start = named(path), start
        if not self.path.exists():
            raise TicketError(f"{self.path}: no such file or folder; expected a ticket file or the run directory of `ticketkit find`")
        if at is not None and levels is not None:
            raise TicketError(f"{path}: @{at} and --levels both choose rounds; leave one out")
        self.run = RunDir(self.path) if self.path.is_dir() else None
        levels = levels if at is None else [at]
        self.levels = _file_levels(self.path, levels, start) if self.run is None else _run_levels(self.run, levels)
        self._round = lru_cache(maxsize=1)(self._read)
        meta = self.ticket(self.levels[0]).meta
        if not isinstance(meta.get("model"), str):
            raise TicketError(f"{path}: the ticket does not say of which network it is; write the name as 'model' into its meta")
        self.model: str = meta["model"]
        self.meta = dict(meta)
        ours = self.ticket(self.levels[0]).weights  # a checkpoint may hold more
        self._dense = {name: array for name, array in self._backbone(self._pretrained(dense_weights)).items() if name in ours}
        self.dense_sha256 = weights_sha256(self._dense)

    def ticket(self, level: int | None) -> Ticket:
        """The ticket of one of `levels`."""
        return self._round(level)[1]

    def masks(self, variant: Variant, seed: int) -> Masks:
        """The variant's masks; those drawn at random are drawn from `seed`."""
        masks = self.ticket(self.levels[0] if variant.kind == "dense" else variant.level).masks
        name, _, fraction = variant.kind.partition("=")
        if name == "dense":
            return algebra.full(masks)
        if name == "random":
            return algebra.random_like(masks, seed)
        if name == "shuffled":
            return algebra.shuffled(masks, seed)
        if name == "complement":
            return algebra.complement(masks)
        return algebra.perturb(masks, float(fraction), seed) if name == "perturb" else masks

    def weights(self, variant: Variant) -> Arrays | None:
        """The variant's starting weights without its head, which is new for each training; None: θ_0, from the training's seed."""
        if variant.kind == "dense":
            return self._dense
        if variant.kind == "reinit":
            return None
        trained, ticket = self._round(variant.level)
        return self._backbone(trained if self.start == "trained" else ticket.weights)

    def _read(self, level: int | None) -> tuple[Arrays, Ticket]:
        if self.run is not None and level is not None:
            trained, ticket = self.run.round(level)
        else:
            trained, ticket = {}, Ticket.load(self.path)
        if not ticket.weights:
            raise TicketError(f"{self.path}: this ticket holds masks but no weights; expected one that `ticketkit find` wrote")
        return trained, ticket

    def _pretrained(self, given: str | os.PathLike[str] | None) -> Mapping[str, Any]:
        """θ_p, whole."""
        if given is not None:
            return models.read_weights(self.model, str(given))[0]
        if self.run is not None and (self.run.path / "pretrained.safetensors").is_file():
            return read_safetensors(self.run.path / "pretrained.safetensors")[0]
        if self.run is not None and self.meta.get("rewind") == "lr":  # its rounds go on from trained weights, but began with θ_p
            return self.run.rewind()
        if self.meta.get("rewind") == "pretrained":
            return self.ticket(self.levels[0]).weights
        raise TicketError(
            f"{self.path}: the weights of this ticket (rewind {self.meta.get('rewind', 'unknown')}) are not the pretrained ones that "
            "the dense network starts from; give them with --dense-weights FILE"
        )

    def _backbone(self, state: Mapping[str, Any]) -> Arrays:
        return {name: array for name, array in state.items() if not models.in_head(self.model, name)}


def weights_sha256(weights: Mapping[str, Any] | None) -> str:
    """Hash of starting weights by content, "init" for θ_0. The number of batches seen, which changes nothing, is left out."""
    if weights is None:
        return "init"
    return models.state_sha256({name: array for name, array in weights.items() if not name.endswith(".num_batches_tracked")})


def check_control(control: str, start: str) -> str:
    """The control, if it is one, of tickets with that start.

    Raises:
        TicketError: an unknown word, a fraction P that is not above 0 and at most 1, or a control whose weights would be mostly zero.
    """
    if control in ELSEWHERE and start == "trained":
        raise TicketError(f"--control {control}: most of its weights are zero in the sparse-trained ones; expected --start rewound")
    name, equals, text = control.partition("=")
    if name == "perturb" and equals:
        try:
            if 0.0 < float(text) <= 1.0:
                return f"perturb={float(text):g}"
        except ValueError:
            pass
        raise TicketError(f"--control: expected perturb=P with a fraction P above 0 and at most 1, got {control!r}")
    if control not in CONTROLS or name == "perturb":
        raise TicketError(f"--control: expected one of {', '.join(CONTROLS)}, got {control!r}")
    return control


def _file_levels(path: Path, levels: Sequence[int] | str | None, start: str) -> list[int | None]:
    if levels is not None:
        raise TicketError(f"{path}: a ticket file is one level; --levels and @K need the run directory of `ticketkit find`")
    if start == "trained":
        raise TicketError(f"{path}: a ticket file has no trained weights; --start trained needs the run directory of `ticketkit find`")
    return [None]


def _run_levels(run: RunDir, levels: Sequence[int] | str | None) -> list[int | None]:
    last = len(run.rows()) - 1
    if last < 1:
        raise TicketError(f"{run.path}: no pruned round is finished; run `ticketkit find` again")
    if levels is None:
        return [last]
    if levels == "all":
        return list(range(1, last + 1))
    if isinstance(levels, str) or not levels or not all(1 <= level <= last for level in levels):
        got = levels if isinstance(levels, str) else ",".join(map(str, levels)) or "none"
        raise TicketError(f"--levels: expected all, or rounds of 1 to {last} of {run.path}, got {got}")
    return list(sorted(set(levels)))
