"""Speed, measured side by side with what others use: `python scripts/benchmark.py optimizers | training`.

peers       who is measured: our optimizers and other people's, with settings that agree
bounds      what the machine can do, and the least that a step of each method has to do
optimizers  the measuring of optimizer steps
training    the same of whole training steps
record      what is written to results/benchmarks/
"""
