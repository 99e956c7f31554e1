from llmeff.testing.failed import CheckFailed as CheckFailed
from llmeff.testing.mixers import check_mixer as check_mixer
from llmeff.testing.optimizers import Given as Given
from llmeff.testing.optimizers import apart as apart
from llmeff.testing.optimizers import check_optimizer as check_optimizer
