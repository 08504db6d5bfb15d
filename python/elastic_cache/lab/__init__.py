"""The lab: problems x policies x settings on one machine, answered in turns and judged.

cells.py      what is compared: a policy with its settings, or another project's decoder
answers.py    one answer, and the file that an interrupted run goes on from
session.py    asks the problems, cell after cell
summary.py    answers -> figures with confidence intervals
report.py     figures -> a table, Markdown and JSON
plots.py      figures -> pictures
fast_dllm.py  Fast-dLLM from a checkout of it, on our weights
"""
