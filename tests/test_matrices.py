"""MatrixLayout: its pieces are a partition of the tensor, and going to matrices and back is the identity."""

import io
import json

import pytest
import torch

from hf_muon.matrices import MatrixLayout

LAYOUTS = {
    "linear": MatrixLayout((6, 4)),
    "q, k, v": MatrixLayout((8, 4), sizes=(4, 2, 2)),
    "q, k, v per head": MatrixLayout((8, 4), sizes=(4, 2, 2), heads=(2, 1, 1)),
    "interleaved by head": MatrixLayout((12, 4), blocks=2, sizes=(2, 2, 2)),
    "interleaved by head, per head": MatrixLayout((16, 4), blocks=2, sizes=(4, 2, 2), heads=(4, 2, 2)),
    "columns (GPT-2)": MatrixLayout((4, 12), dim=1, sizes=(4, 4, 4), transposed=True),
    "output projection per head": MatrixLayout((4, 12), dim=1, sizes=(12,), heads=(3,)),
    "column blocks per head": MatrixLayout((4, 12), dim=1, blocks=2, sizes=(4, 2), heads=(4, 2)),
    "experts": MatrixLayout((3, 6, 4), batch=1),
    "experts, gate then up": MatrixLayout((3, 6, 4), batch=1, sizes=(3, 3)),
    "experts transposed, gate and up interleaved": MatrixLayout(
        (3, 4, 6), batch=1, dim=1, blocks=3, sizes=(1, 1), transposed=True
    ),
    "two batch dimensions": MatrixLayout((2, 3, 4, 5), batch=2, sizes=(1, 3)),
    "convolution": MatrixLayout((6, 4, 3, 3)),
    "grouped convolution": MatrixLayout((6, 4, 3), groups=3),
    "grouped, cut": MatrixLayout((12, 4, 3), groups=3, sizes=(1, 3)),
    "grouped, per head": MatrixLayout((12, 4), groups=3, sizes=(4,), heads=(2,)),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    return request.param


def strided(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """The same shape contiguous, transposed in memory, and as every second element of something larger."""
    n = torch.Size(shape).numel()
    plain = torch.arange(n, dtype=torch.float64).reshape(shape)
    order = tuple(reversed(range(len(shape))))
    flipped = plain.permute(order).contiguous().permute(order)
    sparse = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2]
    sparse.copy_(plain)
    return [plain, flipped, sparse]


def test_pieces_are_views_that_cover_every_element_once(layout):
    for tensor in strided(layout.shape):
        for piece in layout.pieces(tensor):
            piece.add_(1000)
        assert torch.equal(tensor, torch.arange(tensor.numel(), dtype=torch.float64).reshape(layout.shape) + 1000)


def test_matrices_and_back_is_the_identity(layout):
    for tensor in strided(layout.shape):
        for i, piece in enumerate(layout.pieces(tensor)):
            stack = layout.to_matrices(piece, i)
            n, rows, cols = layout.matrices()[i]
            assert stack.shape == ((n, cols, rows) if layout.transposed else (n, rows, cols))
            assert torch.equal(layout.from_matrices(stack, i, piece), piece)


def test_matrices_hold_every_element_once(layout):
    tensor = torch.arange(torch.Size(layout.shape).numel()).reshape(layout.shape)
    stacks = [layout.to_matrices(p, i) for i, p in enumerate(layout.pieces(tensor))]
    assert sum(len(s) for s in stacks) == layout.total()
    assert torch.equal(torch.cat([s.flatten() for s in stacks]).sort().values, torch.arange(tensor.numel()))


def test_key_survives_torch_save_and_json(layout):
    buffer = io.BytesIO()
    torch.save(layout.key(), buffer)
    buffer.seek(0)
    assert MatrixLayout.of(torch.load(buffer, weights_only=True)) == layout
    assert MatrixLayout.of(json.loads(json.dumps(layout.key()))) == layout


def test_interleaved_pieces_against_a_view_by_hand():
    weight = torch.arange(48).reshape(12, 4)
    q, k, v = MatrixLayout((12, 4), blocks=2, sizes=(2, 2, 2)).pieces(weight)
    by_hand = weight.view(2, 3, 2, 4)
    for piece, i in ((q, 0), (k, 1), (v, 2)):
        assert torch.equal(piece, by_hand[:, i])


def test_columns_of_an_output_projection_against_a_view_by_hand():
    weight = torch.arange(48).reshape(4, 12)
    layout = MatrixLayout((4, 12), dim=1, sizes=(12,), heads=(3,))
    (piece,) = layout.pieces(weight)
    stack = layout.to_matrices(piece, 0)
    assert torch.equal(stack, torch.stack([weight[:, 0:4], weight[:, 4:8], weight[:, 8:12]]))


@pytest.mark.parametrize(
    "values",
    [
        dict(shape=(6,)),
        dict(shape=(6, 4), batch=1),
        dict(shape=(6, 4), sizes=(3, 2)),
        dict(shape=(6, 4), blocks=2, sizes=(3, 2)),
        dict(shape=(6, 4), groups=4),
        dict(shape=(6, 4), dim=2),
        dict(shape=(6, 4, 3), dim=1, sizes=(2, 2)),
        dict(shape=(6, 4), sizes=(3, 3), heads=(1,)),
        dict(shape=(6, 4), sizes=(3, 3), heads=(2, 3)),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_refused(values):
    with pytest.raises(ValueError):
        MatrixLayout(**values)


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="layout of"):
        MatrixLayout((6, 4)).pieces(torch.zeros(4, 6))
