"""Cluster: plan a run by arithmetic, and check the nodes of a job before it starts."""
