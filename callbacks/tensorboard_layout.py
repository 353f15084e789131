"""How TensorBoard's custom-scalar page groups the run's tags."""

Layout = dict[str, dict[str, list[object]]]


def _lines(*tags: str) -> list[object]:
    """A chart with one line for every tag that matches one of the expressions."""
    return ["Multiline", list(tags)]


def custom_scalar_layout() -> Layout:
    """Categories, their charts, and the tags (regular expressions) of each."""
    layers = r"aux/layer_\d+"
    return {
        "Loss": {
            "main loss, training and validation": _lines("train/loss_main", "val/loss$", "val/.+/loss"),
            "total and main": _lines("train/loss$", "train/loss_main"),
            "auxiliary, scaled": _lines("train/loss_aux"),
            "perplexity": _lines("val/ppl", "val/.+/ppl"),
        },
        "Auxiliary loss": {
            "by layer, unscaled": _lines(f"{layers}/loss"),
            "share of the total": _lines("aux/share_of_total"),
            "gradient: norm ratio to the main one": _lines("aux/grad_norm_ratio"),
            "gradient: cosine with the main one": _lines("aux/grad_cosine"),
            "target variance by layer": _lines(f"{layers}/target_variance"),
            "target effective rank by layer": _lines(f"{layers}/target_effective_rank"),
            "gate jacobian, largest": _lines(f"{layers}/gate_jacobian_max"),
            "gate jacobian, share above 1": _lines(f"{layers}/gate_jacobian_share"),
        },
        "Optimiser": {
            "gradient norm before clipping": _lines("train/grad_norm"),
            "learning rate": _lines("train/lr"),
            "tokens seen": _lines("train/tokens"),
            "steps skipped, in all": _lines("train/skipped_steps"),
            "loss spikes since the last point": _lines("train/spike"),
        },
        "Latency, ms": {
            "whole step": _lines(r"latency/step_p\d+_ms"),
            "phases, median": _lines(r"latency/(data|forward|backward|optimizer)_p50_ms"),
            "phases, 99th percentile": _lines(r"latency/(data|forward|backward|optimizer)_p99_ms"),
        },
        "Throughput": {
            "tokens a second": _lines("throughput/tokens_per_second$"),
            "tokens a second and device": _lines("throughput/tokens_per_second_per_device"),
            "model TFLOP/s a device": _lines("throughput/model_tflops_per_second_per_device"),
            "MFU": _lines("throughput/mfu"),
        },
        "Memory, MiB": {
            "step": _lines("memory/(allocated|reserved|rss|peak)$"),
            "peak by phase": _lines("memory/(forward|backward|optimizer)_peak"),
        },
    }
