package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	archive "github.com/moby/go-archive"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/daemon"
)

// old is when everything in a test's trees was changed last.
var old = time.Date(2020, 2, 3, 4, 5, 6, 0, time.UTC)

// plant makes a tree: a name that ends in a slash is a directory, a value that
// begins with "->" a symlink, with "=" a hard link.
func plant(t *testing.T, dir string, names ...string) string {
	t.Helper()
	for _, line := range names {
		name, value, _ := strings.Cut(line, " ")
		p := filepath.Join(dir, name)
		var err error
		switch {
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(p, 0o755)
		case strings.HasPrefix(value, "->"):
			err = os.Symlink(value[2:], p)
		case strings.HasPrefix(value, "="):
			err = os.Link(filepath.Join(dir, value[1:]), p)
		default:
			err = os.WriteFile(p, []byte(value), 0o640)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ts, _ := unix.TimeToTimespec(old)
	filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		return errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	})
	return dir
}

// tree says what a directory holds, a line for each name.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	links := map[uint64]string{}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		rel, _ := filepath.Rel(dir, p)
		fmt.Fprintf(&b, "%s %v %d:%d", rel, fi.Mode(), st.Uid, st.Gid)
		if time.Since(fi.ModTime()) > time.Hour {
			fmt.Fprint(&b, " ", fi.ModTime().UTC().Format(time.DateTime))
		}
		switch {
		case fi.Mode()&fs.ModeSymlink != 0:
			to, _ := os.Readlink(p)
			fmt.Fprint(&b, " -> ", to)
		case fi.Mode().IsRegular():
			if first, ok := links[st.Ino]; ok {
				fmt.Fprint(&b, " = ", first)
			}
			links[st.Ino] = rel
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", data)
		}
		fmt.Fprintln(&b)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// served is a daemon whose mount "m" has a directory's files. Its tar is another
// where one is given.
type served struct {
	mount daemon.Mount
	tar   []byte
	err   *daemon.Error // at the tar's end
}

func (s *served) find(path string, follow bool) (string, unix.Stat_t, error) {
	var st unix.Stat_t
	root, err := unix.Open(s.mount.Dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", st, err
	}
	defer unix.Close(root)
	flags := uint64(unix.O_PATH)
	if !follow {
		flags |= unix.O_NOFOLLOW
	}
	fd, err := openIn(root, path, flags, inRoot)
	if err != nil {
		return "", st, err
	}
	defer unix.Close(fd)
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", st, err
	}
	base, err := filepath.EvalSymlinks(s.mount.Dir)
	if err != nil {
		return "", st, err
	}
	return "/" + strings.TrimPrefix(strings.TrimPrefix(real, base), "/"), st, unix.Fstat(fd, &st)
}

func (s *served) handler(t *testing.T) http.Handler {
	mux := http.NewServeMux()
	refuse := func(w http.ResponseWriter, exit int, err error) {
		w.WriteHeader(http.StatusBadRequest)
		json.NewEncoder(w).Encode(daemon.Error{Message: err.Error(), Exit: exit})
	}
	mux.HandleFunc("POST /v1/inspect", func(w http.ResponseWriter, r *http.Request) {
		var o daemon.UnmountOptions
		json.NewDecoder(r.Body).Decode(&o)
		if o.Mount != "m" {
			refuse(w, daemon.ExitNotFound, errors.New("No such mount: "+o.Mount))
			return
		}
		json.NewEncoder(w).Encode(s.mount)
	})
	mux.HandleFunc("POST /v1/stat", func(w http.ResponseWriter, r *http.Request) {
		var o daemon.ExportOptions
		json.NewDecoder(r.Body).Decode(&o)
		real, st, err := s.find(o.Path, o.Follow)
		if err != nil {
			refuse(w, daemon.ExitNotFound, fmt.Errorf("%s: %s: %w", o.Image, o.Path, err))
			return
		}
		json.NewEncoder(w).Encode(daemon.File{Path: real, Mode: st.Mode, Size: st.Size})
	})
	mux.HandleFunc("POST /v1/export", func(w http.ResponseWriter, r *http.Request) {
		var o daemon.ExportOptions
		json.NewDecoder(r.Body).Decode(&o)
		w.Header().Set("Trailer", "Varve-Error")
		w.WriteHeader(http.StatusOK)
		if s.tar != nil {
			w.Write(s.tar)
		} else {
			root, from := s.mount.Dir, strings.TrimPrefix(o.Path, "/")
			k, err := newPacker(filepath.Join(root, from), o.Follow)
			if err != nil {
				t.Error(err)
				return
			}
			defer k.root.Close()
			k.archive = true
			name := filepath.Base(o.Path)
			if o.Path == "/" {
				name = ""
			}
			if err := k.pack(r.Context(), w, name); err != nil {
				t.Error(err)
			}
		}
		if s.err != nil {
			b, _ := json.Marshal(s.err)
			w.Header().Set("Varve-Error", string(b))
		}
	})
	return mux
}

// cp runs the verb against a daemon of the test's own.
func (s *served) cp(ctx context.Context, t *testing.T, in io.Reader, args ...string) (out []byte, err error) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: s.handler(t)}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(l) })
	defer func() { srv.Close(); wg.Wait() }()
	a := &app{root: t.TempDir(), host: "unix://" + l.Addr().String()}
	cmd := a.cpCmd()
	wrapArgs(cmd)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	var b bytes.Buffer
	cmd.SetIn(in)
	cmd.SetOut(&b)
	cmd.SetArgs(args)
	err = cmd.ExecuteContext(ctx)
	return b.Bytes(), err
}

// into copies into a directory as into the root of a mount.
func into(t *testing.T, c *copier, in io.Reader, src, dir, path string) error {
	t.Helper()
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(root)
	c.in, c.meter.w = in, io.Discard
	return c.intoRoot(t.Context(), src, end{of: "m", path: path}, root)
}

var (
	sources = []string{
		"file content", "dir/", "dir/a in a", "dir/sub/", "dir/sub/b in b", "dir/link ->a", "dir/dangling ->nowhere",
		"dir/hard =dir/a", "dir/empty/", "flink ->file", "dlink ->dir", "deep/", "deep/flink ->../file", "ro/", "ro/x in x",
	}
	destinations = []string{
		"file old", "empty/", "full/", "full/dir/", "full/dir/a old a", "full/dir/more stays", "full/file old",
		"clash/", "clash/dir in the way", "clash/file/", "todir ->empty", "tofile ->file", "tonew ->new", "tonowhere ->no/new",
		"toclash ->clash",
	}
)

// TestCopyLikeDocker copies all kinds of sources to all kinds of destinations,
// in and out, and compares with what docker's own library makes of it.
func TestCopyLikeDocker(t *testing.T) {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		t.Setenv("TMPDIR", "/dev/shm") // names by the ten thousand: a disk takes its time for them
	}
	src := plant(t, t.TempDir(), sources...)
	os.Chmod(filepath.Join(src, "dir/sub"), 0o700)
	os.Chmod(filepath.Join(src, "ro"), 0o555)
	s := &served{mount: daemon.Mount{Dir: src, Name: "m", State: "mounted"}}
	for _, from := range []string{
		"file", "file/", "dir", "dir/", "dir/.", "dlink", "dlink/", "dlink/.", "flink", "deep/flink", "missing", "dir/dangling", "dir/link", "ro",
	} {
		for _, to := range []string{
			"", "new", "new/", "new/.", "file", "file/", "empty", "empty/", "empty/.", "full", "full/", "clash", "todir", "todir/",
			"tofile", "tonew", "tonowhere", "toclash", "no/new", "file/new", "full/dir", "full/dir/new",
		} {
			for _, follow := range []bool{false, true} {
				if follow && !strings.Contains(from, "link") {
					continue // as without
				}
				t.Run(fmt.Sprintf("%s to %s, follow %v", from, to, follow), func(t *testing.T) {
					want, out, in := plant(t, t.TempDir(), destinations...), plant(t, t.TempDir(), destinations...), plant(t, t.TempDir(), destinations...)
					werr := archive.CopyResource(src+"/"+from, want+"/"+to, follow)
					args := []string{"m:/" + from, out + "/" + to}
					if follow {
						args = append(args, "-L")
					}
					_, oerr := s.cp(t.Context(), t, nil, args...)
					ierr := into(t, &copier{follow: follow}, nil, src+"/"+from, in, "/"+to)
					for what, got := range map[string]struct {
						dir string
						err error
					}{"out": {out, oerr}, "in": {in, ierr}} {
						if (got.err == nil) != (werr == nil) {
							t.Errorf("%s: %v, want %v", what, got.err, werr)
						}
						if d := cmp.Diff(tree(t, want), tree(t, got.dir)); d != "" && werr == nil {
							t.Errorf("%s: (-want +got)\n%s", what, d)
						}
					}
				})
			}
		}
	}
}

func TestParseEnd(t *testing.T) {
	for _, tt := range []struct {
		arg  string
		want end
		err  bool
	}{
		{"-", end{path: "-"}, false},
		{"file", end{path: "file"}, false},
		{"/a:/b", end{path: "/a:/b"}, false},
		{"./a:b", end{path: "./a:b"}, false},
		{"../a:/b", end{path: "../a:/b"}, false},
		{":/a", end{path: ":/a"}, false},
		{"m:/etc", end{of: "m", path: "/etc"}, false},
		{"m:etc/x", end{of: "m", path: "etc/x"}, false},
		{"m:.", end{of: "m", path: "."}, false},
		{"m:", end{}, true},
		{"0123456789ab:/", end{of: "0123456789ab", path: "/"}, false},
		{"debian:12:/etc/os-release", end{of: "debian:12", path: "/etc/os-release"}, false},
		{"debian:12", end{of: "debian", path: "12"}, false},
		{"localhost:5000/a/b:1:/x:/y", end{of: "localhost:5000/a/b:1", path: "/x:/y"}, false},
		{"a@sha256:00:/x/", end{of: "a@sha256:00", path: "/x/"}, false},
		{"oci:/lay/out:v1:/etc", end{of: "oci:/lay/out:v1", path: "/etc", image: true}, false},
		{"oci:./lay:/", end{of: "oci:./lay", path: "/", image: true}, false},
		{"docker-archive:a.tar:repo:tag:/etc", end{of: "docker-archive:a.tar:repo:tag", path: "/etc", image: true}, false},
		{"oci:/layout", end{}, true},
		{"docker-archive:x:etc", end{}, true},
	} {
		got, err := parseEnd(tt.arg)
		if got != tt.want || (err != nil) != tt.err || err != nil && exitCode(err) != daemon.ExitUsage {
			t.Errorf("%s: %+v, %v, want %+v", tt.arg, got, err, tt.want)
		}
	}
}

func TestCopyRefused(t *testing.T) {
	src := plant(t, t.TempDir(), sources...)
	dst := plant(t, t.TempDir(), destinations...)
	unix.Mkfifo(dst+"/fifo", 0o600)
	up := daemon.Mount{Name: "m", State: "mounted", Dir: src}
	ro, down := up, up
	down.State, down.RW = "unmounted", true
	gone := up
	gone.RW = true // its directory is no mount
	for _, tt := range []struct {
		m        daemon.Mount
		from, to string
		want     string
		exit     int
	}{
		{up, "m:/a", "m:/b", "copying between containers is not supported", daemon.ExitUsage},
		{up, "/a", "/b", "must specify at least one container source", daemon.ExitUsage},
		{up, "-", "-", "must specify at least one container source", daemon.ExitUsage},
		{up, "", "/b", "source can not be empty", daemon.ExitUsage},
		{up, "m:/a", "", "destination can not be empty", daemon.ExitUsage},
		{up, "/a", "oci:x:/b", "cannot be changed", daemon.ExitUsage},
		{up, "x:a", "/b", "No such mount: x", daemon.ExitNotFound},
		{up, "/a", "x:/b", "No such mount: x", daemon.ExitNotFound},
		{up, "m:/missing", dst, "no such file", daemon.ExitNotFound},
		{up, "m:/file/", dst, "m:/file/: not a directory", daemon.ExitError},
		{up, "m:/file", dst + "/no/new", `invalid output path: directory "` + dst + `/no" does not exist`, daemon.ExitNotFound},
		{up, "m:/file", dst + "/new/", "no such directory: " + dst + "/new/", daemon.ExitNotFound},
		{up, "m:/dir", dst + "/file", "cannot copy a directory to a file", daemon.ExitError},
		{up, "m:/dir", dst + "/fifo", "must be a directory or a regular file", daemon.ExitError},
		{up, "m:/file", dst + "/clash", "cannot overwrite directory with non-directory", daemon.ExitError},
		{ro, src + "/file", "m:/b", "the mount m is read-only: mount it with --rw", daemon.ExitUsage},
		{down, src + "/file", "m:/b", "the mount m is unmounted", daemon.ExitError},
		{gone, src + "/file", "m:/b", "nothing is mounted there any more", daemon.ExitError},
	} {
		_, err := (&served{mount: tt.m}).cp(t.Context(), t, nil, tt.from, tt.to)
		if err == nil || !strings.Contains(message(err), tt.want) || exitCode(err) != tt.exit {
			t.Errorf("%s to %s: %v, exit %d, want %s, %d", tt.from, tt.to, err, exitCode(err), tt.want, tt.exit)
		}
	}
	for _, tt := range []struct {
		from, to string
		want     string
		exit     int
	}{
		{src + "/missing", "/", "no such file", daemon.ExitNotFound},
		{src + "/file", "/no/new", "Could not find the file /no in mount m", daemon.ExitNotFound},
		{src + "/file", "/new/", "no such directory: /new/", daemon.ExitNotFound},
		{src + "/dir", "/file", "cannot copy a directory to a file: /file", daemon.ExitError},
		{src + "/file", "/fifo", `destination "m:/fifo" must be a directory or a regular file`, daemon.ExitError},
		{"-", "/file", `destination "m:/file" must be a directory`, daemon.ExitError},
		{"-", "/missing", `destination "m:/missing" must be a directory`, daemon.ExitError},
		{dst, "/", "cannot copy a directory into itself", daemon.ExitError},
		{dst + "/full", "/full/dir", "cannot copy a directory into itself", daemon.ExitError},
	} {
		err := into(t, &copier{}, strings.NewReader(""), tt.from, dst, tt.to)
		if err == nil || !strings.Contains(message(err), tt.want) || exitCode(err) != tt.exit {
			t.Errorf("%s to %s: %v, exit %d, want %s, %d", tt.from, tt.to, err, exitCode(err), tt.want, tt.exit)
		}
	}
}

// TestCopyIntoMount goes the whole way to what is really a mount.
func TestCopyIntoMount(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount")
	}
	dst := t.TempDir()
	if err := unix.Mount(dst, dst, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dst, unix.MNT_DETACH)
	src := plant(t, t.TempDir(), sources...)
	if err := os.Chown(src+"/file", 1234, 5678); err != nil {
		t.Fatal(err)
	}
	s := &served{mount: daemon.Mount{Name: "m", Dir: dst, State: "mounted", RW: true}}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{src + "/file", "m:/f"}, `f -rw-r----- 0:0 2020-02-03 04:05:06 "content"`},
		{[]string{"-a", src + "/file", "m:f"}, `f -rw-r----- 1234:5678 2020-02-03 04:05:06 "content"`},
	} {
		if _, err := s.cp(t.Context(), t, nil, tt.args...); err != nil {
			t.Errorf("%q: %v", tt.args, err)
		}
		if got := tree(t, dst); !strings.Contains(got, tt.want) {
			t.Errorf("%q:\n%s", tt.args, got)
		}
	}
}
