"""What a rank leaves of a run: its slices of weights, momentum and gradients, the plan, the model as it sees it."""

import torch
from torch.distributed.tensor import DTensor

from hf_muon import Muon
from hf_muon.exchange.layout import span_on
from hf_muon.state import momenta
from hf_muon.units import Unit


def slices(unit: Unit, tensors) -> dict[str, tuple[int, torch.Tensor]]:
    """name -> (first element, elements stored here); ``tensors`` by index of the parameter."""
    storage = unit.storage
    items = tensors.items() if isinstance(tensors, dict) else enumerate(tensors)
    return {
        unit.names[i]: (span_on(storage.placements[i], storage.rank, 0)[0], t.detach().clone().cpu()) for i, t in items
    }


class Recorder:
    """Every gradient slice that reaches the optimizer, in order, and the weights before the first."""

    def __init__(self, muon: Muon):
        self.steps, self.start, self.muon = [], {}, muon
        for method in ("_step_muon", "_step_adamw"):
            self._wrap(method)

    def _wrap(self, method):
        original = getattr(self.muon, method)

        def wrapped(unit, *more):
            for name, weight in slices(unit, unit.weights()).items():
                self.start.setdefault(name, weight)
            self.steps.append({"lr": unit.group["lr"], "unit": unit.key, "grads": slices(unit, unit.grads)})
            original(unit, *more)

        setattr(self.muon, method, wrapped)


def whole(p: torch.Tensor) -> torch.Tensor:
    """A parameter of the model as its forward sees it, wherever its parts are."""
    if hasattr(p, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


def plan(unit: Unit) -> list[dict]:
    """Who holds and who orthogonalizes each slab of matrices of a unit."""
    return [
        {
            "name": unit.names[job.param],
            "matrices": job.layout.total(),
            "owner": job.owner,
            "holders": [span.rank for span in job.holders],
        }
        for job in (unit.exchange.jobs if unit.exchange is not None else ())
    ]


def outcome(model: torch.nn.Module, muon: Muon | None, recorder: Recorder | None) -> dict:
    """What the tests look at after training; ``muon`` is None for a run of plain AdamW."""
    wrapper = "_checkpoint_wrapped_module."
    result = {"model": {n.replace(wrapper, ""): whole(p) for n, p in model.named_parameters()}}
    if muon is None:
        return result
    result.update(weights={}, momentum={}, plan=[], engine="")
    for unit in muon._units.values():
        result["engine"] = unit.storage.engine
        result["weights"].update(slices(unit, unit.weights()))
        result["plan"] += plan(unit)
        if unit.exchange is not None:
            result["momentum"].update(slices(unit, momenta(muon.state, unit)))
    return {
        **result,
        "orthogonalized": muon.telemetry.orthogonalized,
        "skipped": muon.telemetry.skipped_steps,
        "steps": recorder.steps if recorder else [],
        "start": recorder.start if recorder else {},
    }
