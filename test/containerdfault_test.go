package test

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
)

// soon does what may fail until it does not, for at most a minute: containerd
// connects to its snapshotters anew in its own time.
func soon(t *testing.T, f func() error) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("it still fails: %v", err)
		}
	}
}

// startable tries to make a container and removes it.
func (c *ctrd) startable(id string, img client.Image) error {
	k, err := c.create(id, img, launch{}, "/bin/child", "sum", "/own/file")
	if err != nil {
		return err
	}
	return k.Delete(c.ctx, client.WithSnapshotCleanup)
}

// nobodyThere reports whether containerd says that its snapshotter is away: it names
// the socket where it has seen that, and says that it is unavailable where a call was
// on its way.
func nobodyThere(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "snapshotter.sock") || strings.Contains(err.Error(), "unavailable"))
}

// TestContainerdRestarts ends containerd in order and by force while a container
// runs, which goes on.
func TestContainerdRestarts(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, _, ref := c.pushed(forms.EStargz, "restarts")
		c.running("old", c.pull(ref))
		for name, sig := range map[string]syscall.Signal{"after a stop": syscall.SIGTERM, "after a kill": syscall.SIGKILL} {
			c.down(sig)
			c.up()
			img := mustGet[client.Image](t)(c.GetImage(c.ctx, ref))
			if got := c.again("old").exec("/bin/child", "sum", "/own/file"); got != sumOf(content("restarts", 300_000)) {
				t.Errorf("%s: the container sees digest %s", name, got)
			}
			if got := c.does("new", img, "/bin/child", "sum", "/own/user"); got != sumOf(content("restarts user", 100_000)) {
				t.Errorf("%s: a new container sees digest %s", name, got)
			}
			c.lowersAre(name, 1)
		}
		c.again("old").kill()
		c.removeImage(ref)
		c.lowersAre("all is removed", 0)
	})
}

// TestContainerdDaemonAway ends varve's daemon in order and by force: who makes a
// container is told so, and when the daemon is back it has all that was there.
func TestContainerdDaemonAway(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		r, made, ref := c.pushed(forms.EStargz, "away")
		_, _, other := c.pushed(forms.Gzip, "other")
		before := c.files()
		img := c.pull(ref)
		old := c.running("old", img)
		old.exec("/bin/child", "change", "/changed")
		c.does("first", img, "/bin/child", "sum", "/own/file")
		for what, end := range map[string]func(){"stopped": c.stop, "killed": c.kill} {
			r.settled() // what is on its way would be lost, and fetched again
			end()
			err := c.startable("new", img) // whose context ends where containerd is stuck
			if !nobodyThere(err) {
				t.Errorf("%s: a container cannot be made: %v", what, err)
			}
			if _, err := c.tryPull(other); !nobodyThere(err) {
				t.Errorf("%s: an image cannot be pulled: %v", what, err)
			}
			c.ok("ps")
			soon(t, func() error { return c.startable("new", img) })
			r.settled()
			r.requests(made)
			if got := c.does("next", img, "/bin/child", "sum", "/own/file"); got != sumOf(content("away", 300_000)) {
				t.Errorf("%s: a container then sees digest %s", what, got)
			}
			got, ranges := r.requests(made)
			if got["blob"] != 0 {
				t.Errorf("%s: what was here was fetched again: %v", what, ranges)
			}
			c.lowersAre(what, 1)

			// The old one's lies on what the old daemon served: it may not have all, and
			// does not hang.
			out, err := exec.Command(child, "sum", old.rootfs("own/user")).CombinedOutput()
			if got := strings.TrimSpace(string(out)); err == nil && got != sumOf(content("away user", 100_000)) || err != nil && !strings.Contains(got, "input/output error") {
				t.Errorf("%s: the old container sees %s, %v", what, got, err)
			}

			// What the old container wrote is there when it is started anew.
			must(t, old.task.Kill(c.ctx, 9))
			old.over()
			old = c.begin(old.Container)
			if got := old.exec("/bin/child", "sum", "/changed/renamed"); got != sumOf(content("changed/2", 5000)) {
				t.Errorf("%s: what was written has digest %s", what, got)
			}
		}
		old.kill()
		c.removeImage(ref)
		c.lowersAre("all is removed", 0)
		c.leftAre("all is removed", before)
	})
}

// TestContainerdRegistryAway starts containers of an image whose registry has gone,
// also of one of which nothing is here any more.
func TestContainerdRegistryAway(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		r, _, ref := c.pushed(forms.EStargz, "gone")
		_, _, unknown := c.pushed(forms.EStargz, "unknown")
		img := c.pull(ref)
		c.does("first", img, "/bin/child", "sum", "/own/file")
		r.rec.SetFault(func(*http.Request) *link.Fault { return &link.Fault{Status: http.StatusServiceUnavailable} })
		if got := c.does("second", img, "/bin/child", "sum", "/own/file"); got != sumOf(content("gone", 300_000)) {
			t.Errorf("while the registry is away: digest %s", got)
		}
		c.stop()
		c.ok("ps")
		soon(t, func() error { return c.startable("third", img) })
		if got := c.does("third", img, "/bin/child", "sum", "/own/file"); got != sumOf(content("gone", 300_000)) {
			t.Errorf("and the daemon is another: digest %s", got)
		}

		// The cache may be deleted at any time. An answer that may change is waited for.
		r.rec.SetFault(func(*http.Request) *link.Fault { return &link.Fault{Status: http.StatusForbidden} })
		c.stop()
		must(t, os.RemoveAll(filepath.Join(c.root, "cache")))
		c.ok("ps")
		var err error
		soon(t, func() error {
			err = c.startable("fourth", img)
			if nobodyThere(err) {
				return err
			}
			return nil
		})
		if err == nil || !strings.Contains(err.Error(), ref[:strings.LastIndex(ref, ":")]) || !strings.Contains(err.Error(), "403") {
			t.Errorf("with nothing here a container cannot be made: %v", err)
		}
		c.does("other", c.pull(unknown), "/bin/child", "sum", "/own/file") // nobody is stuck
		r.rec.SetFault(nil)
		if got := c.does("fifth", img, "/bin/child", "sum", "/own/file"); got != sumOf(content("gone", 300_000)) {
			t.Errorf("the registry is back: digest %s", got)
		}
	})
}

// TestContainerdDamaged pulls an image with a layer whose bytes are not what its
// digest says: the error of who starts a container names it.
func TestContainerdDamaged(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		for _, form := range []forms.Form{forms.Gzip, forms.EStargz} {
			r, made, ref := c.pushed(form, "damaged-"+string(form))
			digests, sizes := blobs(t, made)
			r.rec.SetFault(func(q *http.Request) *link.Fault {
				if strings.HasSuffix(q.URL.Path, digests[1]) {
					return &link.Fault{Corrupt: sizes[1] - 200} // where eStargz has its table of contents
				}
				return nil
			})
			img, err := c.tryPull(ref)
			if err == nil {
				err = c.startable("one", img)
			}
			if err == nil || !strings.Contains(err.Error(), digests[1][:len("sha256:")+12]) {
				t.Errorf("%s: the error is %v", form, err)
			}
			if form == forms.EStargz {
				continue // containerd fetched it by itself, in vain, and keeps that
			}
			// Nothing of it stays: with the right bytes it can be pulled.
			r.rec.SetFault(nil)
			if got := c.does("two", c.pull(ref), "/bin/child", "sum", "/kinds/file"); got != sumOf(content("kinds", 70_000)) {
				t.Errorf("%s: then a container sees digest %s", form, got)
			}
		}
	})
}

// TestContainerdUnmounted takes away what containers lie on, as a user may try.
func TestContainerdUnmounted(t *testing.T) {
	withContainerd(t, func(t *testing.T, c *ctrd) {
		_, _, ref := c.pushed(forms.EStargz, "unmounted")
		img := c.pull(ref)
		k := c.running("old", img)
		name := c.ok("ps", "--format", "{{.Names}}")
		for _, args := range [][]string{{"umount", name}, {"umount", "--force", name}, {"rm", "--force", name}} {
			if line := c.fails(7, args...); !strings.Contains(line, "containerd") {
				t.Errorf("varve %v: %s", args, line)
			}
		}
		c.ok("umount", "--all")
		c.lowersAre("a user wanted to unmount it", 1)
		k.exec("/bin/child", "sum", "/own/file")
		k.kill()

		lower, _ := c.lowers()
		must(t, syscall.Unmount(strings.Fields(lower[0])[4], syscall.MNT_DETACH))
		if got := c.does("new", img, "/bin/child", "sum", "/own/file"); got != sumOf(content("unmounted", 300_000)) {
			t.Errorf("unmounted behind the daemon's back: digest %s", got)
		}
		c.removeImage(ref)
		c.lowersAre("all is removed", 0)
	})
}
