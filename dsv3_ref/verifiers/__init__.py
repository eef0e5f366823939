"""Verifiers: check mathematical answers and generated code, in processes that can be killed."""
