"""Load testing: a scenario in, measured latency and throughput out, with what the numbers cannot tell said beside them.

    arrivals   when requests of an open loop are due (pure)
    runner     sends the requests and notes the times
    metrics    turns noted times into the result (pure); states every definition
    report     tables, JSON and one self-contained HTML file
    progress   what is shown while a test runs

Importing this package imports nothing heavy; the modules import numpy.
"""
