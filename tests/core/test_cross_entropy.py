"""The chunked loss equals the plain one, ignores what is to be ignored, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from support import RecordedOperators, assert_same, relative_error

from mmrec.core.cross_entropy import linear_cross_entropy, linear_cross_entropy_naive


def test_equals_cross_entropy_of_all_logits() -> None:
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 11, (23,))
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-1)
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    for chunk in (1, 5, 23, 100):
        loss, count = linear_cross_entropy(hidden, weight, labels, chunk)
        assert count == (labels != -1).sum()
        assert_same(loss, expected)
        for actual, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), expected_grads, strict=True):
            assert_same(actual, wanted)


def test_nothing_to_learn_gives_zero_and_a_zero_gradient() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss, count = linear_cross_entropy(hidden, torch.randn(11, 8), torch.full((4,), -1), 2)
    loss.backward()
    assert loss == 0
    assert count == 0
    assert torch.equal(hidden.grad, torch.zeros(4, 8))


def test_logits_exist_a_chunk_at_a_time() -> None:
    hidden, weight, labels = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True), torch.randint(500, (64,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss, _ = linear_cross_entropy(hidden, weight, labels, 16)
    assert max(kept) <= max(weight.numel(), hidden.numel())
    assert sum(n >= 16 * 500 for n in kept if n != weight.numel()) == 0
    loss.backward()
    assert hidden.grad is not None


def test_bf16_logits_are_summed_in_fp32() -> None:
    hidden, weight, labels = torch.randn(64, 8).bfloat16(), torch.randn(500, 8).bfloat16(), torch.randint(500, (64,))
    loss, _ = linear_cross_entropy(hidden, weight, labels, 16)
    assert loss.dtype == torch.float32
    assert_same(loss, F.cross_entropy(hidden.float() @ weight.float().T, labels), limit=5e-3)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
def test_the_kernel_compiles_for_the_gpus_it_is_meant_for(element: str, with_gradient: bool, architecture: int) -> None:
    """As the launcher asks for it at a vocabulary of 32,000; all loads and stores of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    from mmrec.core.cross_entropy_kernels import BLOCK, softmax_kernel

    signature = {"logits_ptr": element, "labels_ptr": "*i64", "losses_ptr": "*fp32", "V": "i32", "logits_stride": "i32"}
    constants = {"IGNORED": -1, "WITH_GRADIENT": with_gradient, "BV": BLOCK}
    aligned = {(index,): [["tt.divisibility", 16]] for index in (0, 3, 4)}
    source = ASTSource(softmax_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    compiled = compile_source(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8})
    assert ".v4" in compiled.asm["ptx"]
    assert ("st.global.v4" in compiled.asm["ptx"]) == with_gradient


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("chunk", [100, 512, 4096])
def test_on_a_gpu_loss_and_gradients_against_float64(mode: str, chunk: int) -> None:
    N, D, V = 1000, 64, 20011  # V is beyond one block of the kernel, and no multiple of anything
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    hidden = torch.randn(N, D, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device="cuda") / 8).to(dtype).requires_grad_()
    labels = torch.randint(-1, V, (N,), device="cuda")
    labels[::7] = -1
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth, exact_count = linear_cross_entropy(*exact, labels, chunk)
    expected = torch.autograd.grad(truth, exact)
    with torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"), RecordedOperators() as recorded:
        loss, count = linear_cross_entropy(hidden, weight, labels, chunk)
    assert recorded.names == ["linear_cross_entropy"]
    actual = torch.autograd.grad(3 * loss, (hidden, weight))
    assert count == exact_count
    # The logits are rounded to bf16, to 2⁻⁹ each; in the mean of some 850 the errors cancel.
    assert relative_error(loss, truth) < (1e-6 if mode == "fp32" else 1e-4)
    for gradient, wanted, leaf in zip(actual, expected, (hidden, weight), strict=True):
        assert gradient.dtype == leaf.dtype
        assert relative_error(gradient, 3 * wanted) < (1e-5 if mode == "fp32" else 1e-2)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"):
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, chunk)[0], loss)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device_and_memory_is_a_chunk() -> None:
    N, D, V, chunk = 8192, 128, 32000, 1024
    hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", requires_grad=True)
    labels = torch.randint(-1, V, (N,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        for attempt in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.set_sync_debug_mode("error" if attempt else "default")  # the first call compiles
            try:
                linear_cross_entropy(hidden, weight, labels, chunk)[0].backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    # A chunk of logits in bf16, two gradients of the head in fp32 and its copy in bf16, the hidden states' two gradients; some slack.
    assert torch.cuda.max_memory_allocated() - before < 1.1 * (2 * chunk * V + 10 * V * D + 4 * N * D) + 2**22


@pytest.mark.gpu
def test_on_a_gpu_no_label_gives_zero_and_a_wrong_one_nan() -> None:
    hidden = torch.randn(4, 8, device="cuda", requires_grad=True)
    weight = torch.randn(11, 8, device="cuda")
    loss, count = linear_cross_entropy(hidden, weight, torch.full((4,), -1, device="cuda"), 2)
    loss.backward()
    assert loss == count == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 11, 3], device="cuda"), 2)[0].isnan()


@pytest.mark.gpu
def test_on_a_gpu_it_is_one_node_of_a_compiled_graph() -> None:
    hidden = torch.randn(64, 32, device="cuda", requires_grad=True)
    weight = torch.randn(500, 32, device="cuda", requires_grad=True)
    labels = torch.randint(-1, 500, (64,), device="cuda")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    actual = torch.autograd.grad(compiled(hidden, weight, labels, 16)[0], (hidden, weight))
    expected = torch.autograd.grad(linear_cross_entropy_naive(hidden, weight, labels, 16)[0], (hidden, weight))
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 1e-4
