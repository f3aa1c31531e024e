package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// gitEnv makes git the same for everybody.
var gitEnv = []string{
	"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
	"GIT_AUTHOR_NAME=varve", "GIT_AUTHOR_EMAIL=varve@example.com", "GIT_AUTHOR_DATE=1700000000 +0000",
	"GIT_COMMITTER_NAME=varve", "GIT_COMMITTER_EMAIL=varve@example.com", "GIT_COMMITTER_DATE=1700000000 +0000",
}

// sources makes a tar and a repository of the Go tree, once for each version.
func (b *bench) sources(ctx context.Context) (*sources, error) {
	root, version, err := goTree(ctx)
	if err != nil {
		return nil, err
	}
	s := &sources{tar: filepath.Join(b.dir, version+".tar"), repo: filepath.Join(b.dir, version+".git")}
	if err := made(s.tar, func(path string) error {
		return b.command(ctx, "tar", "--sort=name", "--owner=0", "--group=0", "-cf", path, "-C", root, ".")
	}); err != nil {
		return nil, err
	}
	return s, made(s.repo, func(path string) error {
		in := []string{"git", "--git-dir=" + path, "--work-tree=" + filepath.Join(root, "src")}
		for _, argv := range [][]string{
			{"git", "init", "--quiet", "--bare", "--initial-branch=main", path},
			append(in[:3:3], "add", "--all", "--force", "."),
			append(in[:3:3], "commit", "--quiet", "--message=src"),
			append(in[:3:3], "repack", "-a", "-d", "-q"),
		} {
			if err := b.command(ctx, argv...); err != nil {
				return err
			}
		}
		return nil
	})
}

// goTree is where the Go that runs this has its tree.
func goTree(ctx context.Context) (root, version string, err error) {
	text, err := exec.CommandContext(ctx, "go", "env", "GOROOT", "GOVERSION").Output()
	if err != nil {
		return "", "", fmt.Errorf("go env: %w", err)
	}
	root, version, _ = strings.Cut(strings.TrimSpace(string(text)), "\n")
	return root, version, nil
}

// made makes a file or directory that stays, under its name when it is complete.
func made(path string, make func(path string) error) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	part := path + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	if err := make(part); err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return os.Rename(part, path)
}

func (b *bench) command(ctx context.Context, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), gitEnv...)
	cmd.Dir = "/"
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %.500s", strings.Join(argv, " "), err, said)
	}
	return nil
}

// version is the first line that a program says of itself with a number in it.
func version(ctx context.Context, program string) string {
	text, err := exec.CommandContext(ctx, program, "--version").CombinedOutput()
	if err != nil {
		return "?"
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, filepath.Base(program)) && strings.ContainsAny(line, "0123456789") {
			f := strings.Fields(line)
			return f[len(f)-1]
		}
	}
	return "?"
}
