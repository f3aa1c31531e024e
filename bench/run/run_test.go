package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNamesIn(t *testing.T) {
	const trace = `10 execve("/usr/bin/unshare", ["unshare"], 0x7 /* 9 vars */) = 0
10 openat(AT_FDCWD, "/etc/ld.so.cache", O_RDONLY|O_CLOEXEC) = 3</etc/ld.so.cache>
11 chroot("/scratch/root") = 0
11 execve("/bin/sh", ["sh"], 0x7 /* 9 vars */) = 0
11 openat(AT_FDCWD, "/lib/libc.so.6", O_RDONLY|O_CLOEXEC <unfinished ...>
12 openat(AT_FDCWD, "/gone", O_RDONLY) = -1 ENOENT (No such file or directory)
11 <... openat resumed>) = 3</scratch/root/usr/lib/libc.so.6>
12 openat(3</scratch/root/app>, "x", O_RDONLY) = 4</scratch/root/app/x>
12 openat(AT_FDCWD, "/dev/null", O_WRONLY) = 5</dev/null<char 1:3>>
12 +++ exited with 0 +++
11 --- SIGCHLD {si_signo=SIGCHLD} ---
`
	mount := t.TempDir()
	for _, dir := range []string{"usr/bin", "app"} {
		if err := os.MkdirAll(filepath.Join(mount, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{"usr/bin/dash": "#!/app/run -x\n", "app/run": "no program"} {
		if err := os.WriteFile(filepath.Join(mount, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{"bin": "usr/bin", "usr/bin/sh": "dash"} {
		if err := os.Symlink(to, filepath.Join(mount, name)); err != nil {
			t.Fatal(err)
		}
	}
	got, err := namesIn(strings.NewReader(trace), mount)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"app/run", "app/x", "usr/bin/dash", "usr/lib/libc.so.6"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("names (-want +got):\n%s", d)
	}
}

func TestReplaceSection(t *testing.T) {
	path := filepath.Join(t.TempDir(), "RESULTS.md")
	for _, s := range [][2]string{{"One", "old"}, {"Two", "kept"}, {"One", "new\n\nmore"}} {
		if err := replaceSection(path, s[0], s[1]); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := preamble + "\n## One\n\nnew\n\nmore\n\n## Two\n\nkept\n"
	if d := cmp.Diff(want, string(got)); d != "" {
		t.Errorf("results (-want +got):\n%s", d)
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []int64
		want int64
	}{{nil, 0}, {[]int64{3}, 3}, {[]int64{9, 1, 5}, 5}, {[]int64{4, 1, 2, 9}, 3}} {
		if got := median(c.in); got != c.want {
			t.Errorf("median(%v) = %d, want %d", c.in, got, c.want)
		}
	}
}
