"""One file per box of the flow. No stage imports another; pipelines/ chains them.

Each file has the stage's function on a Dataset (or on tables), and `stage(...)`, which describes it to the runner.
"""
