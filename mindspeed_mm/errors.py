"""Everything this package raises on bad input, in one tree.

MindSpeedMMError
├── ConfigError    a flag, JSON or YAML value: unknown, misspelt, out of range, contradicting another
├── DataError      a dataset, clip, mask, caption or feature file
├── WeightsError   a checkpoint: missing, damaged, of another model, in another dialect
├── LaunchError    ranks, devices, process groups, a folder that another run writes to
├── TrainingError  a run that must not go on: too many iterations in a row were not finite, no room for its metrics
└── NonFiniteError a video whose latents or pixels are NaN or infinite

A message says where, what was found, what is wanted and what to do, in one line:
`data.json[17]: src_mask has 40 frames, src_video 81; cut both to one length, or leave src_video_mask null`
"""


class MindSpeedMMError(Exception):
    """The root. Commands print it as one line and exit with 1."""


class ConfigError(MindSpeedMMError):
    """A flag, JSON or YAML value that cannot be honoured."""


class DataError(MindSpeedMMError):
    """A dataset, clip, mask, caption or feature file that cannot be used."""


class WeightsError(MindSpeedMMError):
    """A checkpoint that is missing, damaged, incomplete or not what was asked for."""


class LaunchError(MindSpeedMMError):
    """Ranks, devices or process groups that do not fit the job."""


class TrainingError(MindSpeedMMError):
    """A run that must not go on: too many iterations in a row were not finite, or its metrics cannot be written."""


class NonFiniteError(MindSpeedMMError):
    """Latents or pixels of a video are NaN or infinite: nothing of it is written."""
