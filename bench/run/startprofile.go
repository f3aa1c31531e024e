package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
)

// profilesWait is how long a daemon may take to keep what it recorded.
const profilesWait = 30 * time.Second

// profiled runs an image's workload on a node with an empty store, over a link
// without a shape, and gives a directory with the start-up profiles that are kept
// there then. If there is a target to convert to, the image is converted to it by
// its profile.
func (b *bench) profiled(ctx context.Context, w *wire, image, converted target, workload string) (kept string, err error) {
	w.link.SetProfile(link.None)
	n, err := b.oursNode(ctx)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	if err := dropCaches(); err != nil {
		return "", err
	}
	// By its own address, which convert needs as well.
	dir, err := n.root(ctx, b.named(image))
	if err != nil {
		return "", err
	}
	if err := b.contain(ctx, dir, workload); err != nil {
		return "", err
	}
	if err := n.leave(ctx); err != nil { // which ends the recording
		return "", err
	}
	p, err := n.profiles(ctx)
	if err != nil {
		return "", err
	}
	b.say("profile of %s: %d ranges, %s MB of files", b.named(image), p.Ranges, mb(p.Bytes))
	if converted != (target{}) {
		cmd := exec.CommandContext(ctx, b.varve, "--root", n.s.root, "convert", "--insecure", "--quiet", "--force", "--from-profile", "@default", "--push", b.named(image), b.named(converted))
		cmd.Dir = "/"
		if _, err := output(cmd); err != nil {
			return "", err
		}
	}
	from, err := n.s.profileDir()
	if err != nil {
		return "", err
	}
	kept = filepath.Join(b.dir, "profiles", image.repo)
	if err := os.RemoveAll(kept); err != nil {
		return "", err
	}
	return kept, os.CopyFS(kept, os.DirFS(from))
}

// profiles waits until a profile is kept.
func (n *oursNode) profiles(ctx context.Context) (daemon.ProfileInfo, error) {
	for deadline := time.Now().Add(profilesWait); ; {
		ps, err := n.s.client.Profiles(ctx, daemon.ProfileOptions{})
		if err != nil {
			return daemon.ProfileInfo{}, err
		}
		if len(ps) > 0 {
			return ps[0], nil
		}
		if time.Now().After(deadline) {
			return daemon.ProfileInfo{}, fmt.Errorf("no profile is kept %s after the workload has ended", profilesWait)
		}
		if err := pause(ctx); err != nil {
			return daemon.ProfileInfo{}, err
		}
	}
}

// profileDir is where a daemon keeps its profiles.
func (s *server) profileDir() (string, error) {
	dirs, err := daemon.DirsFromEnv(s.root)
	return filepath.Join(dirs.State, "profiles"), err
}

// profiledNode is a daemon with an empty store, but for profiles that another kept.
func (b *bench) profiledNode(ctx context.Context, kept string) (*oursNode, error) {
	s := &server{bench: b, root: filepath.Join(b.dir, "node")}
	if err := b.remove(s.root); err != nil {
		return nil, err
	}
	dir, err := s.profileDir()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return nil, err
	}
	if err := os.CopyFS(dir, os.DirFS(kept)); err != nil {
		return nil, err
	}
	if s, err = b.serve(ctx, "node"); err != nil {
		return nil, err
	}
	return &oursNode{s: s}, nil
}

// ahead says by what the node knew what a start would read: by nothing, by a
// profile of its own, by what is in the image.
func (n *oursNode) ahead(ctx context.Context) (string, error) {
	m, err := n.s.client.Inspect(ctx, n.mount)
	if err != nil || m.Profile == nil {
		return "", err
	}
	return m.Profile.Source, nil
}

// profiledWays are starts with profiles of earlier ones: of the image as eStargz,
// of its indexed copy, and of the one of the corpus that reads large files in part
// also after a conversion by its profile.
func (b *bench) profiledWays(ctx context.Context, w *wire, image string) (ways []way, err error) {
	esgz, indexed, converted := target{image, tagEStargz}, target{repoIndexed + image, tagPlain}, target{}
	if image == "jdk" {
		converted = target{repoConverted + image, tagEStargz}
	}
	for _, p := range []struct {
		form  string
		image target
		then  target
	}{
		{formProfile, esgz, converted}, {formIndexedProfile, indexed, target{}}, {formConverted, converted, target{}},
	} {
		if p.image == (target{}) {
			continue
		}
		kept, err := b.profiled(ctx, w, p.image, p.then, workloads[image])
		if err != nil {
			return nil, fmt.Errorf("record %s: %w", b.named(p.image), err)
		}
		ways = append(ways, way{system: systemOurs, form: p.form, image: p.image, ahead: "local",
			node: func(ctx context.Context) (node, error) { return b.profiledNode(ctx, kept) }})
	}
	if image == "jdk" {
		ways = append(ways, b.oursWay(formConvertedAlone, converted))
	}
	return ways, nil
}
