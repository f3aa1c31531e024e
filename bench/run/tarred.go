package main

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
)

// tarOf reads a whole tree by `tar c` and gives the length of the archive. Its
// output goes through a pipe: where tar writes to /dev/null it reads no contents.
func tarOf(ctx context.Context, dir string) (int64, error) {
	cmd := exec.CommandContext(ctx, "bash", "-c", `set -o pipefail; tar --one-file-system -C "$0" -c . | wc -c`, dir)
	cmd.Dir = "/"
	said, err := output(cmd)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(said, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("wc of %s: %w", dir, err)
	}
	return n, nil
}
