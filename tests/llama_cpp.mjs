// Greedy text of llama.cpp: reads {model, adapter, prompts, tokens} as JSON from stdin, answers [{tokens, generated}].
// Run with node in a folder where `npm install node-llama-cpp` has run.
import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const found = createRequire(process.cwd() + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(found));
const job = JSON.parse(readFileSync(0, "utf8"));
// One thread: llama.cpp's threads spin, which costs minutes where cores are shared.
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: "error"});
const model = await llama.loadModel({modelPath: job.model});
const lora = job.adapter ? {adapters: [{filePath: job.adapter}]} : undefined;
const context = await model.createContext({contextSize: 256, threads: 1, lora});
const answers = [];
for (const prompt of job.prompts) {
  const sequence = context.getSequence();
  const tokens = model.tokenize(prompt);
  const generated = [];
  for await (const token of sequence.evaluate(tokens, {temperature: 0})) {
    generated.push(token);
    if (generated.length >= job.tokens) break;
  }
  answers.push({tokens, generated});
  await sequence.dispose();
}
process.stdout.write(JSON.stringify(answers), () => process.exit(0));
