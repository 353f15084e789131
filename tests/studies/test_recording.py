"""What a run keeps in memory."""

from mmrec.studies.recording import MemoryLogger


def test_a_mean_of_layers_is_of_their_latest_values_from_the_first_asked_for() -> None:
    logger = MemoryLogger()
    for step, values in enumerate([(0.0, 9.0, 9.0), (0.0, 2.0, 4.0)]):
        logger.log_metrics({f"aux/layer_{index:02d}/target_variance": value for index, value in enumerate(values)}, step)
    logger.log_metrics({"aux/layer_02/loss": 7.0, "aux/grad_cosine": 1.0}, 1)
    assert logger.mean_of_layers("target_variance") == 2.0
    assert logger.mean_of_layers("target_variance", first=1) == 3.0
    assert logger.mean_of_layers("target_effective_rank") is None
