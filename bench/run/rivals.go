package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// rivals are the programs that ours is measured beside, and what starts a
// container for all of them. A path that is empty is a rival that is not here.
type rivals struct {
	containerd, ctr   string
	stargz, ctrRemote string // containerd-stargz-grpc and its client
	sociGRPC, soci    string // soci-snapshotter-grpc, and soci, which makes its indexes
	skopeo, umoci     string // the full pull where there is no containerd
	runtime           string // runc or crun
}

// noRival is given for a path to leave out what would be found.
const noRival = "none"

// flags asks for the paths.
func (r *rivals) flags(f *flag.FlagSet) {
	f.StringVar(&r.containerd, "containerd", "", "containerd, with its ctr beside it or in PATH; found in PATH if there, \"none\" leaves it out, as with the others")
	f.StringVar(&r.stargz, "stargz", "", "containerd-stargz-grpc; found in PATH if there")
	f.StringVar(&r.ctrRemote, "ctr-remote", "", "ctr-remote of stargz-snapshotter, which pulls lazily for it and for soci-snapshotter; found in PATH if there")
	f.StringVar(&r.sociGRPC, "soci-grpc", "", "soci-snapshotter-grpc; found in PATH if there")
	f.StringVar(&r.soci, "soci", "", "soci, which makes the indexes of soci-snapshotter; found in PATH if there")
	f.StringVar(&r.runtime, "runtime", "", "what starts a container, for ours and for the rivals: runc (default) or crun; found in PATH")
}

// find looks for what was not given. A path that was given has to be a program.
func (r *rivals) find() error {
	given := []struct {
		path  *string
		names []string
	}{
		{&r.containerd, []string{"containerd"}},
		{&r.stargz, []string{"containerd-stargz-grpc"}},
		{&r.ctrRemote, []string{"ctr-remote"}},
		{&r.sociGRPC, []string{"soci-snapshotter-grpc"}},
		{&r.soci, []string{"soci"}},
		{&r.runtime, []string{"runc", "crun"}},
		{&r.skopeo, []string{"skopeo"}},
		{&r.umoci, []string{"umoci"}},
	}
	for _, g := range given {
		if *g.path == noRival {
			*g.path = ""
			continue
		}
		if *g.path != "" {
			path, err := exec.LookPath(*g.path)
			if err == nil {
				path, err = filepath.Abs(path)
			}
			if err != nil {
				return fmt.Errorf("a rival's program: %w", err)
			}
			*g.path = path
			continue
		}
		for _, name := range g.names {
			if path, err := exec.LookPath(name); err == nil {
				*g.path = path
				break
			}
		}
	}
	if r.containerd == "" {
		return nil
	}
	beside := filepath.Join(filepath.Dir(r.containerd), "ctr")
	if _, err := os.Stat(beside); err == nil {
		r.ctr = beside
		return nil
	}
	path, err := exec.LookPath("ctr")
	if err != nil {
		return fmt.Errorf("containerd is %s, but there is no ctr beside it or in PATH: %w", r.containerd, err)
	}
	r.ctr = path
	return nil
}

// startable says whether a container can be started at all.
func (r *rivals) startable() error {
	if r.runtime == "" {
		return errors.New("neither runc nor crun is here: apt-get install runc")
	}
	if r.containerd == "" && (r.skopeo == "" || r.umoci == "") {
		return errors.New("the full pull is containerd's, or skopeo's and umoci's: apt-get install skopeo umoci")
	}
	return nil
}

// lazyStargz and lazySOCI say whether these can be measured.
func (r *rivals) lazyStargz() bool { return r.containerd != "" && r.stargz != "" && r.ctrRemote != "" }
func (r *rivals) lazySOCI() bool {
	return r.containerd != "" && r.sociGRPC != "" && r.soci != "" && r.ctrRemote != ""
}

// full is the name of the full pull.
func (r *rivals) full() string {
	if r.containerd != "" {
		return systemOverlayfs
	}
	return systemUnpacked
}

// versions says what they are, for the results.
func (r *rivals) versions(ctx context.Context) string {
	var said []string
	for _, p := range []struct {
		path, flag string
	}{
		{r.runtime, "--version"}, {r.containerd, "--version"}, {r.stargz, "--version"}, {r.sociGRPC, "--version"},
	} {
		if p.path != "" {
			said = append(said, versionOf(ctx, p.path, p.flag))
		}
	}
	if r.containerd == "" {
		said = append(said, versionOf(ctx, r.skopeo, "--version"), versionOf(ctx, r.umoci, "--version"))
	}
	return strings.Join(said, "; ")
}

// versionOf is the first line of what a program says of itself, named by its file
// and without digests of commits.
func versionOf(ctx context.Context, path, flag string) string {
	name := filepath.Base(path)
	text, err := exec.CommandContext(ctx, path, flag).Output()
	line, _, _ := strings.Cut(string(text), "\n")
	for _, f := range strings.Fields(line) {
		if err == nil && strings.ContainsAny(f, "0123456789") && strings.Contains(f, ".") && !strings.Contains(f, "/") {
			return name + " " + f
		}
	}
	return name
}
