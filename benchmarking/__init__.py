"""Measurements: speed, side by side with what others use (`make bench`), and how well structures fit (`make fisher`).

peers       who is measured: our optimizers and other people's, with settings that agree
bounds      what the machine can do, and the least that a step of each method has to do
optimizers  the measuring of optimizer steps
training    the same of whole training steps; `loops` has the loops of others
solvers     which QR, eigenvectors and complement columns a refresh should take
scaling     steps on several processes; `traffic` counts their messages, `prediction` extends them to more GPUs
structures  how well each optimizer's structure fits the Fisher matrix of a real model (scripts/fisher_report.py)
gpu_suite   all that a GPU is needed for, within a given time (scripts/gpu_suite.py)
wheels      packages for a machine without a network
record      the file that is written
"""
