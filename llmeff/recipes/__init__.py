from llmeff.recipes.first import debug as debug
from llmeff.recipes.first import default as default
from llmeff.recipes.recipe import RECIPES as RECIPES
from llmeff.recipes.recipe import recipe as recipe
from llmeff.recipes.yardstick import yardstick as yardstick
