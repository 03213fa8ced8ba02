"""Layouts that engines leave behind, made by hand in one process: recognised as they are, or refused by name."""

import pytest
import torch
import torch.distributed as dist

from hf_muon import MatrixLayout, Muon
from hf_muon.engines import LayoutError


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _zero(group, gap=0):
    """An optimizer whose two matrices DeepSpeed has laid into one buffer, the second first, with a gap between."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((6, 4), (4, 8))]
    optimizer = Muon([{"params": [("a", params[0]), ("b", params[1])]}], lr=0.1, weight_decay=0.5, ns_dtype="float32")
    buffer = torch.cat([params[1].detach().flatten(), torch.zeros(gap), params[0].detach().flatten()])
    params[1].data, params[0].data = buffer[:32].view(4, 8), buffer[32 + gap :].view(6, 4)
    for p in params:
        p._dp_group = group
    flat = buffer.clone().requires_grad_()
    optimizer.param_groups[0]["params"] = [flat]
    return params, flat, optimizer


@pytest.mark.parametrize("gap", [0, 3])
def test_a_reordered_flat_buffer_gives_the_update_of_whole_parameters(group, gap):
    params, flat, optimizer = _zero(group, gap)
    whole = [torch.nn.Parameter(p.detach().clone()) for p in params]
    reference = Muon(whole, lr=0.1, weight_decay=0.5, ns_dtype="float32")
    for seed in range(3):
        torch.manual_seed(seed)
        for p in whole:
            p.grad = torch.randn_like(p)
        flat.grad = torch.cat([whole[1].grad.flatten(), torch.zeros(gap), whole[0].grad.flatten()])
        optimizer.step()
        reference.step()
    assert torch.equal(flat[:32].view(4, 8), whole[1]) and torch.equal(flat[32 + gap :].view(6, 4), whole[0])


def test_zeros_in_one_group_of_deepspeed_are_a_step_like_any(group):
    # It steps group by group: the others may have gradients, and one process would decay these weights too.
    _, flat, optimizer = _zero(group)
    start, flat.grad = flat.detach().clone(), torch.zeros_like(flat)
    optimizer.step()
    assert torch.equal(flat, start * (1 - 0.1 * 0.5))


def test_weights_changed_behind_deepspeeds_back_are_refused_by_name(group):
    params, flat, optimizer = _zero(group)
    with torch.no_grad():
        params[0].add_(1)
    flat.grad = torch.ones_like(flat)
    with pytest.raises(LayoutError, match="the weights of a are not where"):
        optimizer.step()
    assert not optimizer.state


def test_a_parameter_that_was_cut_by_tensor_parallelism_is_refused_by_name(group):
    params, flat, optimizer = _zero(group)
    params[0].data = flat.detach()[32:44].view(3, 4)
    params[1].data = flat.detach()[:32].view(4, 8)
    flat.grad = torch.ones_like(flat)
    with pytest.raises(LayoutError, match="a had 24 elements and has 12"):
        optimizer.step()


def test_a_group_of_unnamed_parameters_is_refused_once_it_is_flattened(group):
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = Muon([{"params": [p], "matrices": [MatrixLayout((4, 4)).key()]}])
    p._dp_group = group
    flat = p.detach().flatten().clone().requires_grad_()
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    with pytest.raises(LayoutError, match="hf_muon.param_groups"):
        optimizer.step()
