"""What a memory's forward keeps for its backward, and the backward that goes on through the addresses' norms."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from addressed import GRADIENTS, SCALE, Addressed, draw
from cases import CPU, CPU_LOW, GPU, GPU_LOW, INTERPRETED, INTERPRETED_LOW, MEMORY, Setting, in_settings
from kernel_tools import SHARED_MEMORY, compiled_for
from recorded import operator
from support import TOLERANCE, assert_same
from test_registration import strided, strided_like
from tiles import small_tiles
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmrec.ops import segments
from mmrec.ops.memory_address import kernels as address_kernels
from mmrec.ops.memory_address import memory_address
from mmrec.ops.memory_scan import addressed, chaining, launchers, memory_scan_naive
from mmrec.ops.memory_scan import operator as memory_operator
from mmrec.ops.tuning import overridden

pytestmark = pytest.mark.usefixtures("poisoned_memory")
WIDTHS = [(20, 20), (64, 64), (128, 128), (256, 20), (20, 36)]  # keys and values: the fourth is too wide for one program
OBLONG = [(20, 64), (36, 20), (16, 36), (64, 36), (128, 20), (20, 128), (36, 4)]  # a tile of 32 beside one of 64 came out wrong
ONE_HEAD = INTERPRETED.resized(B=1, H=1)
TWO_SEQUENCES = INTERPRETED.resized(H=1)
MANY_HEADS = GPU_LOW[0].resized(B=13)  # of 128 channels and bf16: the class whose walk reads out, and so keeps its memories
FEW_HEADS = GPU_LOW[0].resized(B=1, H=8)  # at 8,192 tokens cut into as many segments as make them that class
IN_SEGMENTS = 76  # tokens, where a segment may have 6: four segments of 19, so that each has a chunk of 16 and a tail
given = pytest.mark.parametrize("everything", [True, False], ids=["all given", "little given"])


@pytest.fixture
def fused_walk(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under the interpreter, where it is not the default, the walk that reads out on the way; elsewhere the table decides."""
    if request.node.get_closest_marker("interpreted") is None:
        yield
        return
    with overridden(**small_tiles(fused=1)):
        yield


@pytest.fixture
def found(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Into how many segments calls were cut; under the interpreter short sequences are cut too, where they have equal parts."""
    if request.node.get_closest_marker("interpreted") is not None:
        monkeypatch.setattr(segments, "LEAST", 6)
    monkeypatch.setattr(chaining, "_WORTH", 4)
    counts: list[int] = []
    right = chaining.count
    monkeypatch.setattr(chaining, "count", lambda *arguments: counts.append(right(*arguments)) or counts[-1])
    return counts


def apart(tensor: Tensor) -> Tensor:
    """The same with room for a token between its sequences, which then cannot be cut."""
    return torch.cat([tensor, torch.ones_like(tensor[:, :1])], dim=1)[:, :-1]


def assert_equal_to_the_naive_forms(setting: Setting, case: Addressed) -> None:
    gradients = case.gradients()
    for name, expected in case.truth().items():
        # Of one token it is a sum over a whole memory, stored in bf16, whose parts may cancel.
        loose = 2 if name == "log_alpha" and setting.dtype == torch.bfloat16 else 1
        assert_same(gradients[name], expected, limit=loose * MEMORY.gradient_limit(setting), what=f"gradient to {name}")
    assert not any(gradient.isnan().any() for gradient in gradients.values())


@given
@in_settings(
    [
        *((CPU, time) for time in (1, 9, 70)),
        *((setting, 70) for setting in CPU_LOW),
        *((INTERPRETED, time) for time in (1, 37)),
        *((ONE_HEAD.resized(K=K, V=V), 21) for K, V in WIDTHS),
        *((setting, 21) for setting in INTERPRETED_LOW),
        *((setting.resized(K=K, V=V), time) for setting in (GPU, *GPU_LOW) for K, V in (*WIDTHS, (256, 256)) for time in (1, 130)),
        *((GPU_LOW[0].resized(K=K, V=V), time) for K, V in OBLONG for time in (65, 130)),
        *((MANY_HEADS, 333), (MANY_HEADS.resized(K=36, V=20), 130), (MANY_HEADS.resized(K=20, V=36), 130)),
    ]
)
def test_gradients_equal_the_naive_forms(setting: Setting, time: int, everything: bool) -> None:
    assert_equal_to_the_naive_forms(setting, draw(setting, time, everything))


@given
@in_settings([(INTERPRETED, 1), (INTERPRETED, 16), (INTERPRETED, 37), (INTERPRETED_LOW[0], 21), (ONE_HEAD.resized(K=20, V=256), 21)])
@pytest.mark.usefixtures("fused_walk")
def test_gradients_where_the_memories_are_kept(setting: Setting, time: int, everything: bool) -> None:
    assert_equal_to_the_naive_forms(setting, draw(setting, time, everything))


@in_settings(
    [
        *((INTERPRETED, 16), (INTERPRETED, 37), (INTERPRETED_LOW[0], 37), (TWO_SEQUENCES, IN_SEGMENTS)),
        (MANY_HEADS, 333),
        (FEW_HEADS, 8192),
    ]
)
@pytest.mark.usefixtures("fused_walk")
def test_kept_memories_are_those_that_a_backward_would_make(
    setting: Setting, time: int, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and so are the gradients from them, through autograd as well."""
    case = draw(setting, time)
    query, key, _, _, memories = case.forward()
    v, log_alpha, M0 = (case.inputs[name] for name in ("v", "log_alpha", "M0"))
    made = []
    gradients = launchers._Scan.gradients
    with monkeypatch.context() as patch:
        patch.setattr(
            launchers._Scan, "gradients", lambda scan, q, k, v, dr, M, *rest: made.append(M) or gradients(scan, q, k, v, dr, M, *rest)
        )
        case.gradients(kept=False)
        case.gradients()
    assert memories.numel()
    assert [torch.equal(memories, M) for M in made] == [True, True]
    assert found[-1] > 1 or time not in (IN_SEGMENTS, 8192)

    inputs = (case.dr, case.dM_last, query, key, v, log_alpha, M0, case.reset, SCALE)
    expected = operator("memory_scan_bwd")(*inputs)
    for actual, same in zip(operator("memory_scan_bwd")(*inputs, memories), expected, strict=True):
        assert torch.equal(actual, same)
    for actual, same in zip(case.gradients().values(), case.gradients(kept=False).values(), strict=True):
        assert torch.equal(actual, same)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, v, log_alpha, M0)]
    r, M_last, kept = operator("memory_scan_kept")(*leaves, case.reset, SCALE)
    assert not kept.requires_grad
    for actual, same in zip(torch.autograd.grad([r, M_last], leaves, [case.dr, case.dM_last]), expected, strict=True):
        assert torch.equal(actual, same)


@in_settings([(INTERPRETED, IN_SEGMENTS)])
@pytest.mark.usefixtures("fused_walk")
def test_kept_memories_of_segments_enter_their_chunks(setting: Setting, time: int, found: list[int]) -> None:
    case = draw(setting, time)
    query, key, *_, memories = case.forward()
    batch, heads, K, V = (setting.sizes[letter] for letter in "BHKV")
    by_segment = memories.view(batch, found[-1], heads, -1, K, V)
    assert by_segment.shape[1:4:2] == (4, 2)
    sequences = [tensor.double() for tensor in (query, key, case.inputs["v"], case.inputs["log_alpha"])]
    for segment, chunk in itertools.product(range(4), range(2)):
        before = time // 4 * segment + 16 * chunk
        entering = case.inputs["M0"].double()
        if before:
            entering = memory_scan_naive(*(tensor[:, :before] for tensor in sequences), entering, case.reset[:, :before])[1]
        assert_same(by_segment[:, segment, :, chunk], entering, limit=1e-4, what=f"chunk {chunk} of segment {segment}")


@in_settings([(INTERPRETED, 37), (TWO_SEQUENCES, IN_SEGMENTS), (MANY_HEADS, 333), (FEW_HEADS, 8192)])
@pytest.mark.usefixtures("fused_walk")
def test_the_backward_does_not_walk_forward_again(setting: Setting, time: int, found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for what enters the segments, of which each direction has a walk more."""
    case = draw(setting, time)
    walked = []
    walk = launchers._Scan.walk
    monkeypatch.setattr(launchers._Scan, "walk", lambda *args, reverse: (walked.append(reverse), walk(*args, reverse=reverse))[1])
    whole = time in (37, 333)
    for kept, backward in ((True, [True] if whole else [True, True]), (False, [False, True] if whole else [False, True, False, True])):
        walked.clear()
        case.gradients(kept)
        assert walked == ([False] if whole else [False, False]) + backward
        assert (found[-1] == 1) == whole


@in_settings([(TWO_SEQUENCES, 37)])
def test_memories_are_kept_only_where_the_backward_wants_them(setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of other chunks, of one token or where the walk does not read out; nor are others taken for them. In segments as in one piece."""

    def kept(time: int, **changes: Any) -> torch.Size:
        options = small_tiles(fused=1)
        with overridden(**{**options, **{f"memory_scan.{name}": options[f"memory_scan.{name}"] | row for name, row in changes.items()}}):
            case = draw(setting, time)
            assert_equal_to_the_naive_forms(setting, case)
            return case.forward()[4].shape

    assert kept(time) == (2, 3, 12, 12)
    assert kept(1) == (0,)
    monkeypatch.setattr(chaining, "_WORTH", 4)
    for least, cut, shape in ((1024, time, (2, 3, 12, 12)), (6, IN_SEGMENTS, (8, 2, 12, 12))):
        monkeypatch.setattr(segments, "LEAST", least)
        assert kept(cut) == shape
        assert kept(cut, forward={"fused": 0}) == (0,)
        assert kept(cut, backward={"C": 32}) == (0,)
    monkeypatch.setattr(segments, "LEAST", 1)
    assert kept(4) == (0,)  # four segments of a token


@pytest.mark.parametrize("lying_apart", ["dr", "v", "reset", "k_scale", "dv", "v in the forward"])
@in_settings([(TWO_SEQUENCES, IN_SEGMENTS)])
@pytest.mark.usefixtures("fused_walk")
def test_a_backward_that_is_cut_otherwise_makes_its_own_memories(setting: Setting, time: int, lying_apart: str, found: list[int]) -> None:
    """Neither are those of segments taken for those of a whole sequence, nor the other way round."""
    case = draw(setting, time)
    arguments = [*case.arguments(), *case.outputs()]
    if lying_apart == "v in the forward":
        arguments[9] = operator("memory_scan_kept")(*arguments[2:4], apart(arguments[4]), *arguments[5:9])[2]
    else:
        place = {"dr": 0, "v": 4, "reset": 7, "k_scale": 11, "dv": 15}[lying_apart]
        arguments[place] = apart(arguments[place])
    forward = found[-1]
    operator("addressed_memory_bwd_out")(*arguments)
    assert (forward, found[-1]) == ((1, 4) if lying_apart == "v in the forward" else (4, 1))
    assert arguments[9].shape == ((2, 5, 12, 12) if forward == 1 else (8, 2, 12, 12))
    expected = case.truth()
    for name, gradient in zip(GRADIENTS, arguments[13:], strict=True):
        assert_same(gradient, expected[name], limit=MEMORY.gradient_limit(setting), what=f"gradient to {name}")


@in_settings([(CPU, 37), (CPU_LOW[1], 37)])
def test_the_pytorch_form_keeps_nothing(setting: Setting, time: int) -> None:
    assert draw(setting, time).forward()[4].shape == (0,)


@given
@in_settings(
    [(INTERPRETED, IN_SEGMENTS), (ONE_HEAD, 40), (GPU, 8192), (GPU_LOW[0].resized(B=1, H=2), 8192), (FEW_HEADS, 8192)],
)
@pytest.mark.usefixtures("fused_walk")
def test_segments_side_by_side(setting: Setting, time: int, everything: bool, found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses' tensors are cut as all others are: nothing comes out differently than in one piece, with kept memories or without."""
    case = draw(setting, time, everything)
    with monkeypatch.context() as patch:
        patch.setattr(chaining, "_WORTH", time)
        expected = case.gradients()
    assert set(found) == {1}
    found.clear()
    again = case.gradients(kept=False)
    for name, gradient in case.gradients().items():
        assert_same(gradient, expected[name], limit=max(1e-4, TOLERANCE[setting.dtype]), what=name)
        assert torch.equal(gradient, again[name]), name
    assert min(found) >= 4
    assert bool(case.forward()[4].numel()) == (setting.device == "cpu" or setting is FEW_HEADS)


@in_settings([(CPU, 9), (INTERPRETED, 21), (ONE_HEAD.resized(K=256, V=20), 21), (GPU, 130), (GPU_LOW[0], 700), (MANY_HEADS, 130)])
@pytest.mark.usefixtures("fused_walk")
def test_gradients_go_into_views_of_a_buffer_and_nowhere_else(setting: Setting, time: int) -> None:
    case = draw(setting, time)
    arguments, expected = case.arguments(), tuple(case.gradients().values())
    buffers, views = strided_like(expected)
    strided_arguments = [a if a is None or i in (1, 6, 9) else strided(a) for i, a in enumerate(arguments)]  # a state and memories stay
    operator("addressed_memory_bwd_out")(*strided_arguments, *views)
    for name, view, gradient in zip(GRADIENTS, views, expected, strict=True):
        # Other strides are other layouts of registers, in which a sum over them has another order; the rest is sums of products.
        limit = 1e-5 if name == "log_alpha" and setting.device == "cuda" else 0.0
        assert_same(view, gradient, limit=limit, what=name)
        view.fill_(float("nan"))
    assert all(buffer.isnan().all() for buffer in buffers)


@in_settings([(CPU, 5), (INTERPRETED, 13), (INTERPRETED_LOW[0], 13), (GPU, 130), (GPU_LOW[0], 130)])
def test_addresses_with_their_scales(setting: Setting, time: int) -> None:
    inputs = draw(setting, time).inputs
    q, k, h = (inputs[name].requires_grad_() for name in "qkh")
    outputs = operator("memory_address_scaled")(q, k, h)
    for part, address, same, scale in zip((q, k), outputs[:2], memory_address(q, k, h), outputs[2:], strict=True):
        assert torch.equal(address, same)
        assert (scale.dtype, scale.requires_grad) == (setting.wide, False)
        norm = ((part.double() + h.double()).square().sum(-1) + 1e-6).rsqrt()
        assert_same(scale, norm)
    cotangents = [torch.randn_like(address) for address in outputs[:2]]
    for actual, same in zip(
        torch.autograd.grad(outputs[:2], [q, k, h], cotangents),
        torch.autograd.grad(memory_address(q, k, h), [q, k, h], cotangents),
        strict=True,
    ):
        assert torch.equal(actual, same)


@in_settings([(CPU, 4), (INTERPRETED, 4), (ONE_HEAD.resized(K=256), 4), (GPU, 4)])
def test_zero_vectors_have_finite_gradients(setting: Setting, time: int) -> None:
    case = draw(setting, time)
    for name in "qkh":
        case.inputs[name].zero_()
    truth = case.truth()
    for name, gradient in case.gradients().items():
        assert_same(gradient, truth[name], limit=MEMORY.gradient_limit(setting), what=name)


@given
@in_settings([(CPU, 5), (ONE_HEAD, 5), (ONE_HEAD, 24), (GPU, 5), (MANY_HEADS, 70), (FEW_HEADS, 8192)])
@pytest.mark.usefixtures("fused_walk", "found")
def test_opcheck(setting: Setting, time: int, everything: bool) -> None:
    """Of segments too."""
    case = draw(setting, time, everything)
    q, k, v, log_alpha, h = (case.inputs[name].requires_grad_() for name in ("q", "k", "v", "log_alpha", "h"))
    torch.library.opcheck(operator("memory_address_scaled"), (q, k, h))
    torch.library.opcheck(operator("memory_scan_kept"), (q, k, v, log_alpha, case.inputs.get("M0"), case.reset, SCALE))
    with torch.no_grad():
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in case.arguments())
        torch.library.opcheck(operator("addressed_memory_bwd_out"), (*arguments, *case.outputs()))
        torch.library.opcheck(operator("memory_scan_bwd"), arguments[:10])
        *outputs, _ = (o.detach() for o in case.outputs())
        torch.library.opcheck(operator("memory_scan_bwd_out"), (*arguments[:9], *outputs, arguments[9]))


@pytest.mark.parametrize("lying_apart", ["nothing", "q", "log_alpha", "reset"])
@in_settings([(TWO_SEQUENCES, IN_SEGMENTS), (FEW_HEADS.resized(B=2, H=4), 8192)])
@pytest.mark.usefixtures("fused_walk", "found")
def test_a_fake_knows_what_is_kept(setting: Setting, time: int, lying_apart: str) -> None:
    """By the strides: of sequences that lie apart no segments are made."""
    case = draw(setting, time)
    tensors = [*(case.inputs[name] for name in ("q", "k", "v", "log_alpha", "M0")), case.reset]
    place = {"nothing": None, "q": 0, "log_alpha": 3, "reset": 5}[lying_apart]
    if place is not None:
        tensors[place] = apart(tensors[place])
    memories = operator("memory_scan_kept")(*tensors, SCALE)[2]
    with FakeTensorMode() as mode:
        fake = operator("memory_scan_kept")(*(mode.from_tensor(tensor) for tensor in tensors), SCALE)[2]
    assert (fake.shape, fake.dtype) == (memories.shape, memories.dtype)
    if setting is TWO_SEQUENCES:
        assert fake.shape == ((8, 2, 12, 12) if place is None else (2, 5, 12, 12))


@in_settings([(CPU, 5), (CPU_LOW[0], 5), (INTERPRETED, 5), (GPU, 5)])
def test_kernels_run_where_they_should(setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for module in (launchers, address_kernels):
        right = module.launch
        monkeypatch.setattr(module, "launch", _noting(right, launched))
    case = draw(setting, time)
    arguments = case.arguments()
    launched.clear()
    operator("addressed_memory_bwd_out")(*arguments, *case.outputs())
    assert launched[-1:] == (["gradient_kernel"] if setting in (INTERPRETED, GPU) else [])


def _noting(right: Callable[..., None], launched: list[str]) -> Callable[..., None]:
    def noted(kernel: Any, *rest: Any) -> None:
        launched.append(kernel.__name__ if hasattr(kernel, "__name__") else kernel.fn.__name__)
        right(kernel, *rest)

    return noted


@pytest.mark.timeout(600)
@given
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "heads", "width"),
    [
        *((torch.bfloat16, heads, width) for heads in (2, 32) for width in (64, 128)),
        (torch.bfloat16, 32, 256),
        (torch.float32, 2, 20),
        (torch.float32, 2, 128),
    ],
    ids=str,
)
def test_kernels_compile_and_fit(
    dtype: torch.dtype, heads: int, width: int, architecture: int, everything: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    for module in (memory_operator, addressed):
        monkeypatch.setattr(module, "runs_kernel", lambda *_: True)
    for module in (launchers, address_kernels, chaining):
        monkeypatch.setattr(module, "launch", lambda kernel, tensors, prepare, *_: found.append((kernel, tensors, prepare())))
    setting = Setting("any", dtype, sizes={"B": 4, "H": heads, "K": width, "V": width})
    case = draw(setting, 300, everything)
    case.gradients()
    kept = dtype == torch.bfloat16 and heads == 32 and width <= 128
    # A walk, kept or with its read-out; in the backward that of the memories where not kept, the reversed one, dv's where not read out on
    # the way, the gradients, and, where a head is too wide for one program, the norms.
    assert len(found) == (3 if kept else 7 if width == 256 else 6)
    for kernel, tensors, call in found:
        shared = compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named).metadata.shared
        if architecture < 90 and shared > SHARED_MEMORY[architecture]:
            shared = compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named | {"STAGES": 1}).metadata.shared
        assert shared <= SHARED_MEMORY[architecture], kernel.__name__
