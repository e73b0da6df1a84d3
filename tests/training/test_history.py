"""The results of a run's epochs, and the line of each."""

from okddip.training.history import History

LONGEST_LABEL = "#99 "  # of a job of a sweep


def test_an_epochs_line_fits_a_terminal_also_in_a_sweep() -> None:
    results = {"train/loss": 12.3456, "train/top1": 99.99, "test/top1": 99.99}
    history = History("test")
    *_, is_best = history.add(298, results)
    line = history.line(298, 300, results | {"train/images_per_second": 12345.6}, is_best)
    assert line == "epoch 299/300  loss 12.346  train 99.99%  test 99.99% (best)  12346 images/s"
    assert len(LONGEST_LABEL + line) <= 80
    *_, is_best = history.add(299, results)  # as good, and later
    assert "test 99.99%  " in history.line(299, 300, results | {"train/images_per_second": 1.0}, is_best)
    results.pop("test/top1")  # not evaluated
    assert "test" not in history.line(299, 300, results | {"train/images_per_second": 1.0}, False)
