"""Discrete events around the real batcher: what a policy does to a trace, in seconds instead of hours.

python -m scheduler.simulator                 the comparisons of policies
python -m scheduler.simulator.overhead        what scheduling itself costs, on this machine's clock
python -m scheduler.simulator.replay          a trace on steps as long as those that an engine recorded
"""
