package snapshotter

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/varvefs/varve/daemon"
)

// lower is what a snapshot lies on where some of it is remote: nothing of what lies
// below a remote snapshot is not.
type lower struct {
	s     *Snapshotter
	chain daemon.Chain
	local []string // directories of what lies above the chain, the highest first
	dir   string   // where the chain is mounted
	link  string   // that can lead there, beside local
}

// lower mounts what is remote below a snapshot that is made on parent. It gives nil
// if nothing is. The caller releases it when that snapshot is there.
func (s *Snapshotter) lower(ctx context.Context, parent string) (*lower, error) {
	l, err := s.find(ctx, parent)
	if err != nil || l == nil {
		return nil, err
	}
	s.mu.Lock()
	s.coming[l.chain]++
	s.mu.Unlock()
	if l.dir, err = s.images.Mount(ctx, l.chain); err != nil {
		l.release()
		s.rest() // who asked may have gone, and it is mounted all the same
		return nil, fmt.Errorf("mount %s: %w", l.chain.Name, err)
	}
	return l, nil
}

func (l *lower) release() {
	if l == nil {
		return
	}
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if l.s.coming[l.chain]--; l.s.coming[l.chain] == 0 {
		delete(l.s.coming, l.chain)
	}
}

// find gives what a snapshot that is made on parent lies on, nil if nothing of it is
// remote.
func (s *Snapshotter) find(ctx context.Context, parent string) (*lower, error) {
	var ids []string
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		for key := parent; key != ""; {
			id, info, _, err := storage.GetInfo(ctx, key)
			if err != nil {
				return err
			}
			ids = append(ids, id)
			key = info.Parent
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	l := &lower{s: s}
	for _, id := range ids {
		r, err := readChain(s.dirOf(id))
		if err != nil {
			return nil, err
		}
		if r != nil {
			l.chain, l.link = r.Chain, filepath.Join(s.dirOf(id), "lower")
			return l, nil
		}
		l.local = append(l.local, filepath.Join(s.dirOf(id), "fs"))
	}
	return nil, nil
}

// below gives the mounts of a snapshot: overlayfs, with one directory where its
// remote snapshots would have one each. A view of nothing else is that directory, as
// containerd's own has it: who compares two snapshots goes by that.
func (l *lower) below(ctx context.Context, key string, mounts []mount.Mount) ([]mount.Mount, error) {
	if l == nil {
		return mounts, nil
	}
	info, err := l.s.local.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	lowest := l.dir
	if len(l.local) > 0 {
		if lowest, err = l.linked(); err != nil {
			return nil, err
		}
	} else if info.Kind == snapshots.KindView {
		return []mount.Mount{{Type: "bind", Source: l.dir, Options: []string{"ro", "rbind"}}}, nil
	}
	m := mount.Mount{Type: "overlay", Source: "overlay"}
	for _, o := range mounts[0].Options {
		// A view of one directory is a bind mount of that.
		if !strings.HasPrefix(o, "lowerdir=") && o != "ro" && o != "rbind" {
			m.Options = append(m.Options, o)
		}
	}
	m.Options = append(m.Options, "lowerdir="+strings.Join(append(slices.Clone(l.local), lowest), ":"))
	return []mount.Mount{m}, nil
}

// linked gives a name of where the chain is mounted that lies beside the others: the
// names of all layers are to fit a page, and containerd shortens them by the
// directory that they have in common.
func (l *lower) linked() (string, error) {
	if to, err := os.Readlink(l.link); err == nil && to == l.dir {
		return l.link, nil
	}
	temp := l.link + "-" + rand.Text()
	if err := os.Symlink(l.dir, temp); err != nil {
		return "", err
	}
	return l.link, os.Rename(temp, l.link)
}

// rest has chains that nobody lies on unmounted after a while, and deleted what came
// for snapshots that were not made.
func (s *Snapshotter) rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.idle != nil {
		return
	}
	s.idle = time.AfterFunc(s.linger, func() {
		s.mu.Lock()
		s.idle = nil
		s.mu.Unlock()
		left, err := s.unmountIdle(context.Background(), false)
		if err != nil {
			s.log.Warn("images that no container uses stay mounted", "err", err)
		}
		again := err != nil
		if left != nil {
			used, err := s.images.Sweep(context.Background(), left)
			if err != nil {
				s.log.Warn("what was fetched for containerd and is not needed stays", "err", err)
			}
			again = again || used || err != nil
		}
		if again {
			s.rest()
		}
	})
}

// unmountIdle unmounts the chains that no container lies on, or, where only those
// that are gone are meant, that no snapshot stands for. It gives the chains of all
// remote snapshots, nil where they are not known.
func (s *Snapshotter) unmountIdle(ctx context.Context, gone bool) (all []daemon.Chain, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	used := map[daemon.Chain]bool{}
	for c := range s.coming {
		used[c] = true
	}
	all = []daemon.Chain{}
	var keys []snapshots.Info
	if err := s.local.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		keys = append(keys, i)
		return nil
	}); err != nil {
		return nil, err
	}
	for _, i := range keys {
		if i.Kind != snapshots.KindCommitted {
			l, err := s.find(ctx, i.Parent)
			if err != nil {
				return nil, err
			}
			if l != nil {
				used[l.chain] = true
			}
			continue
		}
		c, err := s.chain(ctx, i.Name)
		if err != nil && !errors.Is(err, errDamaged) { // nothing can lie on such a one
			return nil, err
		}
		if c != nil {
			all = append(all, *c)
			used[*c] = used[*c] || gone
		}
	}
	for c, is := range used {
		if !is {
			delete(used, c)
		}
	}
	return all, s.images.Unmount(ctx, used)
}
