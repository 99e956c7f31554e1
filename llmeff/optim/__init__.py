from llmeff.optim.adamw import AdamW as AdamW
from llmeff.optim.muon import Muon as Muon
from llmeff.optim.optimizer import OptimizerConfig as OptimizerConfig
from llmeff.optim.schedule import WSD as WSD
from llmeff.optim.schedule import Constant as Constant
from llmeff.optim.schedule import Cosine as Cosine
from llmeff.optim.schedule import Linear as Linear
from llmeff.optim.schedule import ScheduleConfig as ScheduleConfig
