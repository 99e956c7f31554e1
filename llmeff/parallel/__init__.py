from llmeff.parallel.ddp import DDP as DDP
from llmeff.parallel.fully_shard import FSDP as FSDP
from llmeff.parallel.single import Single as Single
from llmeff.parallel.strategy import Strategy as Strategy
from llmeff.parallel.strategy import StrategyConfig as StrategyConfig
from llmeff.parallel.strategy import StrategyInputs as StrategyInputs
from llmeff.parallel.zero import DeepSpeed as DeepSpeed
