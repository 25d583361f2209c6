"""The command line without the console script: `python -P -m keepwarm`."""

from keepwarm.launch.cli.main import main

if __name__ == "__main__":
    main()
