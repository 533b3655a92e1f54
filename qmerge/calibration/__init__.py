"""Inputs of the unmerged adapter model: texts, a model run one decoder layer at a time, and the sums over inputs."""
