"""Speed and memory of slothcore beside what else one could install; see README.md."""
