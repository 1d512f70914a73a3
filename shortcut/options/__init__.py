"""Every option, said once; and what is made of it."""
