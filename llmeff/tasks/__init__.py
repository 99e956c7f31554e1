from llmeff.tasks.causal_lm import CausalLM as CausalLM
from llmeff.tasks.recall import Recall as Recall
from llmeff.tasks.segmentation import Segmentation as Segmentation
from llmeff.tasks.task import Sample as Sample
from llmeff.tasks.task import Task as Task
from llmeff.tasks.task import TaskConfig as TaskConfig
