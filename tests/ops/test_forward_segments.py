"""The forward of `gated_scan` in segments: what two passes settle, what takes a third, and what only the whole sequence does."""

from collections.abc import Callable

import pytest
from cases import (
    GATED,
    GATED_LOGITS,
    GPU,
    GPU_LOW,
    INTERPRETED,
    INTERPRETED_LOW,
    ONE_GATE,
    Case,
    Setting,
    gradients,
    in_float64,
    in_settings,
)
from support import TOLERANCE, assert_same
from tiles import small_tiles
from torch import Tensor

from mmrec.ops import segments
from mmrec.ops.gated_scan import kernels
from mmrec.ops.tuning import overridden

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FILLING = 1 << 20  # channels: as many segments as the length allows
cases = pytest.mark.parametrize("case", [GATED, ONE_GATE, GATED_LOGITS], ids=["log γ", "one gate", "two gates"])
SHORT = [(INTERPRETED, 40), (INTERPRETED.resized(B=1, P=12), 56), (INTERPRETED_LOW[0], 40)]
LONG = [(GPU.resized(B=1, D=96, P=48), 16384), (GPU_LOW[0].resized(B=2), 16384)]


def in_segments(
    function: Callable[[], list[Tensor]], setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """What `function` returns with its scan cut, and which channels were wanted after each pass but the first."""
    wanted: list[Tensor] = []
    chain = kernels._chain

    def noted(*arguments: Tensor, **options: bool) -> None:
        chain(*arguments, **options)
        if not options.get("reverse"):
            wanted.append(arguments[6].clone())

    monkeypatch.setattr(kernels, "_chain", noted)
    monkeypatch.setattr(kernels, "WORTH", 4)
    if setting.device == "cpu":
        monkeypatch.setattr(segments, "LEAST", 9)
        options = small_tiles(channels=FILLING)
    else:
        options = {"gated_scan.forward_segments": {"channels": FILLING}}
    with overridden(**options):
        outputs = function()
    assert len(wanted) == 3
    return outputs, wanted[1:]


def scan(case: Case, inputs: dict[str, Tensor], reset: Tensor | None) -> Callable[[], list[Tensor]]:
    return lambda: list(case.op(**inputs, reset=reset))


@pytest.mark.parametrize("gates", ["ordinary", "near 1"])
@pytest.mark.parametrize("given", ["all", "neither state nor reset"])
@cases
@in_settings([*SHORT, *LONG])
def test_equals_the_whole(setting: Setting, time: int, case: Case, given: str, gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, reset = case.draw(setting, time, gates), case.reset(setting, time, share=2 / time)
    inputs["w_g"] *= 0.5
    if given != "all":
        inputs.pop("h0")
        reset = None
    outputs, _ = in_segments(scan(case, inputs, reset), setting, monkeypatch)
    for actual, expected in zip(outputs, case.op(**in_float64(inputs), reset=reset), strict=True):
        assert_same(actual, expected, limit=max(1e-4 if setting.device == "cuda" else 1e-5, TOLERANCE[actual.dtype]))


@cases
@in_settings([*SHORT[:2], *LONG])
def test_two_passes_are_enough_without_a_state_gate(setting: Setting, time: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the scan is linear, and what the first pass says of it holds everywhere: no program of a later pass runs."""
    inputs, reset = case.draw(setting, time), case.reset(setting, time, share=2 / time)
    inputs["w_g"].zero_()
    _, wanted = in_segments(scan(case, inputs, reset), setting, monkeypatch)
    assert all(channels.count_nonzero() == 0 for channels in wanted)


@pytest.mark.parametrize(("strength", "left"), [(3.0, 1), (60.0, 2)], ids=["a third pass", "the whole sequence"])
@in_settings([(INTERPRETED, 40), LONG[0]])
def test_channels_that_need_more(setting: Setting, time: int, strength: float, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steep gates, whose slope in the first pass says little, and slow decays: a segment's start matters at its end."""
    inputs = GATED.draw(setting, time, "near 1")
    inputs["w_g"] *= strength
    inputs["z"] *= 1e3
    outputs, wanted = in_segments(scan(GATED, inputs, None), setting, monkeypatch)
    assert wanted[left - 1].count_nonzero() > 0
    for actual, expected in zip(outputs, GATED.op(**inputs), strict=True):
        assert_same(actual, expected, limit=1e-4)


@in_settings([(INTERPRETED_LOW[0], 40), (INTERPRETED_LOW[1], 40), LONG[1]])
def test_states_in_16_bits_are_handed_on_to_more_digits(setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates of ordinary slope and slow decays: what the second pass starts from is off by less than 16 bits show, and is mended."""
    inputs = GATED.draw(setting, time, "near 1")
    inputs["z"] *= 10
    (_, last), wanted = in_segments(scan(GATED, inputs, None), setting, monkeypatch)
    assert wanted[0].count_nonzero() > 0
    _, expected = GATED.op(**in_float64(inputs))
    assert_same(last, expected, limit=1e-4)


@in_settings([(INTERPRETED, 40), LONG[0]])
def test_a_channel_that_is_not_finite_leaves_the_others_alone(setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = GATED.draw(setting, time)
    inputs["z"][0, time // 2, 3] = float("nan")
    (h, last), _ = in_segments(scan(GATED, inputs, None), setting, monkeypatch)
    assert h[0, time // 2 :, 3].isnan().all()
    assert last[0, 3].isnan()
    assert h.isnan().sum() == time - time // 2
    whole, _ = GATED.op(**inputs)
    assert_same(h.nan_to_num(), whole.nan_to_num(), limit=1e-4)


@cases
@in_settings([(INTERPRETED, 40), LONG[0]])
def test_gradients_of_what_came_out(setting: Setting, time: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, reset = case.draw(setting, time), case.reset(setting, time, share=2 / time)
    inputs["w_g"] *= 0.5
    found: dict[str, Tensor] = {}

    def both() -> list[Tensor]:
        outputs, grads = gradients(case.op, inputs, reset)
        found.update(grads)
        return outputs

    in_segments(both, setting, monkeypatch)
    _, expected = gradients(case.op, in_float64(inputs), reset)
    for name in inputs:
        assert_same(found[name], expected[name], limit=1e-4, what=name)


@in_settings([(INTERPRETED, 40)])
def test_views_that_cannot_be_cut_are_not(setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LEAST", 9)
    monkeypatch.setattr(kernels, "WORTH", 4)
    monkeypatch.setattr(kernels, "segmented_scan", lambda *_: pytest.fail("cut"))
    inputs = GATED.draw(setting, time)
    z = inputs["z"]
    apart = z.new_zeros((z.shape[0], time + 1, z.shape[2]))[:, :time].copy_(z)
    with overridden(**small_tiles(channels=FILLING)):
        h, _ = GATED.op(**{**inputs, "z": apart})
    assert_same(h, GATED.op(**in_float64(inputs))[0])
