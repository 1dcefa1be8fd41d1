"""Command line: ``python -m services serve`` or ``pool``."""

from services.servers import main

if __name__ == "__main__":
    main()
