"""`amulet playground`: one page over `amulet serve`, plain and steered answers side by side."""
