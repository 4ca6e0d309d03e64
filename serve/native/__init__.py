"""The native engine: a whole step of a model in C++, and the scheduler that fills its batches."""
