"""Host memory, resume, atomic files, digests and times: nothing here decides a result."""
