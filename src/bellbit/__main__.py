from bellbit.cli import main

main()
