"""The oracle of the engines: the gradients that reached the optimizer, stepped through whole on one process.

Equal bits are asked for (but see :func:`same`). On several ranks other matrices are stacked together than on one, and a
batched product of float32 depends on its neighbours once it has two threads (from 1e-7 on 32 x 256; never seen with
one): one thread here, as in the workers.
"""

import torch

import hf_muon
from tests.distributed import scenarios
from tests.distributed.launch import joined

torch.set_num_threads(1)


def optimizer(spec: dict) -> tuple[torch.nn.Module, hf_muon.Muon]:
    """The model of a scenario and its optimizer, on one process in float32."""
    model = scenarios.model(spec["model"], "float32")
    config = hf_muon.MuonConfig.from_optim_args(scenarios.optim_args(spec))
    return model, hf_muon.Muon(hf_muon.param_groups(model, config, lr=2e-3, weight_decay=0.1))


def replay(spec: dict, results: list[dict]) -> dict[str, dict]:
    """Weights and momentum, 1-D by name, after the gradients and learning rates that the ranks recorded; metrics."""
    model, muon = optimizer(spec)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, start in joined(results, "start").items():
            params[name].copy_(start.view_as(params[name]))
    for step in steps(results):
        for name, grad in step["grads"].items():
            params[name].grad = grad.view_as(params[name])
        for group in muon.param_groups:
            group["lr"] = step["lr"][group["param_names"][0]]
        muon.step()
        muon.zero_grad()
    momentum = {
        n: muon.state[p]["momentum_buffer"].flatten()
        for group in muon.param_groups
        if group["algorithm"] == "muon"
        for n, p in zip(group["param_names"], group["params"], strict=True)
        if p in muon.state
    }
    trained = {n for group in muon.param_groups for n in group["param_names"]}
    weights = {n: p.detach().flatten() for n, p in params.items() if n in trained}
    return {"weights": weights, "momentum": momentum, "metrics": muon.metrics()}


def same(key: str, name: str, ours: torch.Tensor, expected: dict[str, dict]) -> bool:
    """Whether a slice-wise step gave what the replay gave: the same bits, for all that Muon trains.

    torch's fused AdamW rounds the elements at the end of a tensor, which fill no vector register, otherwise than the
    rest, and a shard ends elsewhere than the whole: there, as near as float32's last bits.
    """
    theirs = expected[key][name]
    if key == "momentum" or name in expected["momentum"]:
        return torch.equal(ours, theirs)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def steps(results: list[dict]) -> list[dict]:
    """Per optimizer step the whole gradients and the learning rates by name; the ranks recorded them by group."""
    units = [s["unit"] for s in results[0]["steps"]]
    assert all([s["unit"] for s in r["steps"]] == units for r in results)
    parts = list(dict.fromkeys(map(tuple, units)))
    assert len(units) % len(parts) == 0
    out = []
    for i in range(0, len(units), len(parts)):
        step = {"grads": {}, "lr": {}}
        for k in range(i, i + len(parts)):
            same = [r["steps"][k] for r in results]
            grads = joined(same, "grads")
            step["grads"].update(grads)
            step["lr"].update(dict.fromkeys(grads, same[0]["lr"]))
        out.append(step)
    return out
