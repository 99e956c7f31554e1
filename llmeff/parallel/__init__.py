from llmeff.parallel.single import Single as Single
from llmeff.parallel.strategy import Strategy as Strategy
from llmeff.parallel.strategy import StrategyConfig as StrategyConfig
