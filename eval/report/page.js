const root = document.documentElement;
const toggle = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.style.colorScheme || (system.matches ? "dark" : "light")) === "dark";
const label = () => { toggle.textContent = isDark() ? "Light theme" : "Dark theme"; };
toggle.hidden = false;
toggle.onclick = () => { root.style.colorScheme = isDark() ? "light" : "dark"; label(); };
system.onchange = label;
label();

const sortable = (table) => {
  const [body, given] = [table.tBodies[0], [...table.tBodies[0].rows]];
  const heads = [...table.tHead.rows[0].cells];
  const numeric = heads.map((head) => head.classList.contains("num"));
  const value = (row, at) => numeric[at] ? parseFloat(row.cells[at].dataset.sort) : row.cells[at].textContent.trim();
  const compare = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b);
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const next = { ascending: "descending", descending: "none" }[head.ariaSort] || "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = next;
      const sign = next === "ascending" ? 1 : -1;
      const [known, unknown] = [true, false].map((k) => given.filter((row) => k !== Object.is(value(row, at), NaN)));
      known.sort((a, b) => sign * compare(value(a, at), value(b, at)));
      body.append(...(next === "none" ? given : [...known, ...unknown]));
    };
  });
};
document.querySelectorAll("table").forEach(sortable);

document.querySelectorAll(".heat").forEach((heat) => {
  const views = [...heat.querySelectorAll(".view")];
  const [line, select] = ["label", "select"].map((name) => document.createElement(name));
  const show = () => views.forEach((view, at) => { view.hidden = at !== select.selectedIndex; });
  views.forEach((view) => select.add(new Option(view.dataset.name)));
  line.className = "pick";
  line.append("Policy", select);
  select.onchange = show;
  heat.prepend(line);
  show();
});
