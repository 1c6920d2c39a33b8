"""Speed of single operations, each beside a peer and beside what the machine allows."""
