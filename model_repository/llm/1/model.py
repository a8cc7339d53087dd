"""Text or chat messages in, text out: tokenises, drives the engine and detokenises in one process.

Inputs and outputs are described in config.pbtxt beside the parameters; `serving/` holds the code.
"""

from serving.llm import ServingModel as TritonPythonModel  # type: ignore[import-not-found]  # noqa: F401 - beside this file
