"""What --help shows of flags that are accepted and do nothing."""

from mindspeed_mm.tasks.jobs.extract import job_parser


def test_help_names_values_as_values():
    text = job_parser().format_help()
    assert "SUPPRESS" not in text
    assert "--manual-gc-interval VALUE" in text
    assert "--manual-gc VALUE" not in text
